//! Two runs beside each other.

use std::fmt::Write;

use crate::marks::marks;
use crate::results::{Results, Row, short};

/// What changed of the product from one run to the other, as ratios to the plaintext double proxy of each run: absolute
/// numbers of two runs do not compare.
pub(crate) fn compare(before: &Results, after: &Results) -> String {
    let mut text = format!("{:9} {:17} {:22} {:>8} {:>8}   change\n", "layout", "measure", "number", "before", "after");
    for row in after.rows() {
        let old = before.row(&row.layout, &row.measure, &row.number);
        let ratio = |row: &Row| row.ratio.map(|ratio| ratio.median);
        let (Some(old), Some(new)) = (ratio(&old), ratio(&row)) else { continue };
        let change = (new / old - 1.0) * 100.0;
        let _ = writeln!(
            text,
            "{:9} {:17} {:22} {:>8} {:>8}   {change:+.0} %",
            row.layout,
            row.measure,
            row.number,
            short(old),
            short(new)
        );
    }
    for (old, new) in marks(before).iter().zip(marks(after)) {
        let _ = writeln!(text, "\nbefore  {old}\nafter   {new}");
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::results::Round;

    #[test]
    fn a_change_is_that_of_the_ratio() {
        let run = |double: f64, justmtls: f64| {
            let one = |value: f64| BTreeMap::from([("p50_us".to_owned(), value)]);
            let numbers = BTreeMap::from([("double".to_owned(), one(double)), ("justmtls".to_owned(), one(justmtls))]);
            let round = Round { layout: "one-cpu".into(), measure: "ping".into(), numbers, ..Round::default() };
            Results { rounds: vec![round], ..Results::default() }
        };
        // The second machine is ten times as slow; the product is half as slow beside the double proxy.
        let text = compare(&run(10.0, 20.0), &run(100.0, 100.0));
        assert!(text.contains("-50 %"), "{text}");
    }
}
