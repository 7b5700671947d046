//! Where a text's YAML documents begin and end.
//!
//! A line that begins with `---` or `...` is a document marker wherever it stands: YAML forbids it inside any scalar
//! (YAML 1.2.2, 9.1.4 `c-forbidden`). So documents can be cut apart before any of them is read, and one that does not scan
//! hides no other.

/// One document's text, its marker line included.
pub(crate) struct Document<'a> {
    pub(crate) text: &'a str,
    /// The line of the file (from 0) at which `text` begins.
    pub(crate) first_line: usize,
}

/// The documents of a text that hold anything but comments and directives.
pub(crate) fn documents(text: &str) -> Vec<Document<'_>> {
    let mut cut = Cut { text, found: Vec::new(), start: 0, start_line: 0, has: Has::default() };
    let mut at = 0;
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let end = at + line.len();
        if is_marker(line, "---") {
            // Directives belong to the document whose marker they precede.
            if !cut.has.directive || cut.has.content {
                cut.close(at, number);
            }
            cut.has = Has { directive: false, content: !is_blank(&line[3..]) };
        } else if is_marker(line, "...") {
            cut.close(end, number + 1);
        } else if line.starts_with('%') && !cut.has.content {
            cut.has.directive = true;
        } else if !is_blank(line) {
            cut.has.content = true;
        }
        at = end;
    }
    cut.close(text.len(), 0);
    cut.found
}

#[derive(Default)]
struct Has {
    directive: bool,
    content: bool,
}

struct Cut<'a> {
    text: &'a str,
    found: Vec<Document<'a>>,
    start: usize,
    start_line: usize,
    has: Has,
}

impl Cut<'_> {
    fn close(&mut self, end: usize, next_line: usize) {
        if self.has.content {
            self.found.push(Document { text: &self.text[self.start..end], first_line: self.start_line });
        }
        self.start = end;
        self.start_line = next_line;
        self.has = Has::default();
    }
}

fn is_marker(line: &str, marker: &str) -> bool {
    line.strip_prefix(marker).is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']))
}

/// Whether a line holds nothing, or a comment alone.
fn is_blank(line: &str) -> bool {
    let line = line.trim_start();
    line.is_empty() || line.starts_with('#')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(text: &str) -> Vec<(usize, &str)> {
        documents(text).into_iter().map(|document| (document.first_line, document.text)).collect()
    }

    #[test]
    fn a_text_is_cut_at_its_markers() {
        assert_eq!(cut(""), []);
        assert_eq!(cut("# nothing\n\n---\n---\n# here\n...\n"), []);
        assert_eq!(cut("a: 1"), [(0, "a: 1")]);
        assert_eq!(cut("a: 1\n---\nb: 2\n"), [(0, "a: 1\n"), (1, "---\nb: 2\n")]);
        assert_eq!(cut("--- # first\r\na: 1\r\n---\r\nb: 2"), [(0, "--- # first\r\na: 1\r\n"), (2, "---\r\nb: 2")]);
        assert_eq!(cut("--- {a: 1}\n--- {b: 2}"), [(0, "--- {a: 1}\n"), (1, "--- {b: 2}")]);
        assert_eq!(cut("a: 1\n...\nb: 2\n"), [(0, "a: 1\n...\n"), (2, "b: 2\n")]);
        assert_eq!(cut("%YAML 1.2\n---\na: 1\n---\nb: 2\n"), [(0, "%YAML 1.2\n---\na: 1\n"), (3, "---\nb: 2\n")]);
    }

    #[test]
    fn what_only_looks_like_a_marker_cuts_nothing() {
        assert_eq!(cut("a: |\n  ---\n  x\nb: ----\n---x: 1\n").len(), 1);
        assert_eq!(cut("a: 1\n%b: 2\n").len(), 1);
    }
}
