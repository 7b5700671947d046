//! Tables for people: columns as wide as their widest cell, nothing cut, no trailing blanks.

/// Rows under a head.
#[derive(Debug, Default)]
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// With the names of its columns.
    pub(crate) fn new(head: &[&str]) -> Self {
        Self { rows: vec![head.iter().map(|name| (*name).to_owned()).collect()] }
    }

    /// Adds a row.
    pub(crate) fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| printable(&cell)).collect());
    }

    /// Whether there is nothing but the head.
    pub(crate) fn is_empty(&self) -> bool {
        self.rows.len() < 2
    }

    /// The lines.
    pub(crate) fn lines(&self) -> Vec<String> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<_> = (0..columns).map(width).collect();
        let line = |row: &Vec<String>| {
            let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        };
        self.rows.iter().map(line).collect()
    }

    /// Prints it; the head in bold where that can be seen.
    pub(crate) fn print(&self) {
        const HEAD: anstyle::Style = anstyle::Style::new().bold();
        for (number, line) in self.lines().iter().enumerate() {
            if number == 0 { anstream::println!("{HEAD}{line}{HEAD:#}") } else { anstream::println!("{line}") }
        }
    }
}

/// A text of a cluster, without what would move the cursor of whoever reads it.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// A list of which there may be much.
pub(crate) fn some(list: &[String]) -> String {
    const SHOWN: usize = 5;
    let shown = list[..list.len().min(SHOWN)].join(", ");
    match list.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["A", "LONGER", "C"]);
        assert!(table.is_empty());
        table.row(["wide cell".into(), "é".into(), String::new()]);
        assert_eq!(table.lines(), ["A          LONGER  C", "wide cell  é"]);
    }

    proptest! {
        #[test]
        fn whatever_a_cluster_says_each_row_is_one_line_without_controls(cells in prop::collection::vec("\\PC*|[\\x00-\\x1f\\x7f]*", 1..4)) {
            let mut table = Table::new(&["A"]);
            table.row(cells);
            let lines = table.lines();
            prop_assert_eq!(lines.len(), 2);
            prop_assert!(lines.iter().all(|line| !line.chars().any(char::is_control)));
        }
    }
}
