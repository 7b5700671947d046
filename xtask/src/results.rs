//! What the test runs said: counts from libtest's result lines, skips from the tests themselves, and the summary.

use std::fmt;
use std::path::Path;

/// Counts of one group of tests.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) name: String,
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    /// One `test: reason` for each test, or part of one, that could not run here.
    pub(crate) skips: Vec<String>,
    /// Names of failed tests, or of what failed before any test ran (a build, a process killed by a signal).
    pub(crate) failures: Vec<String>,
}

impl Group {
    pub(crate) fn named(name: &str) -> Self {
        Self { name: name.to_owned(), ..Self::default() }
    }

    /// Reads one line of `cargo test`'s standard output.
    pub(crate) fn read_line(&mut self, line: &str) {
        if let Some(counts) = line.strip_prefix("test result: ") {
            self.passed += count_before(counts, "passed");
            self.failed += count_before(counts, "failed");
            let ignored = count_before(counts, "ignored");
            self.skips.extend((0..ignored).map(|_| "a test: marked as ignored".to_owned()));
        } else if let Some(name) = line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED")) {
            self.failures.push(name.to_owned());
        }
    }

    /// Adds the skips that tests wrote, one per line, to the file named by `JUSTMTLS_TEST_SKIPS`.
    ///
    /// To libtest such a test has passed: it returned early. Here it counts as skipped and not as passed. One of which a part was
    /// skipped counts by how the rest of it ended.
    pub(crate) fn read_skips(&mut self, file: &Path) {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        for line in text.lines().filter_map(|line| line.strip_prefix("SKIPPED ")) {
            if let Some(part) = line.strip_prefix("PART ") {
                self.skips.push(format!("a part, {part}"));
            } else {
                self.skips.push(line.to_owned());
                self.passed = self.passed.saturating_sub(1);
            }
        }
    }

    /// Says that the run itself failed, if no test is to blame for it.
    pub(crate) fn note_exit(&mut self, success: bool) {
        if !success && self.failures.is_empty() {
            self.failed += 1;
            self.failures.push(format!("{} did not build, or a test process ended without a result", self.name));
        }
    }
}

fn count_before(counts: &str, word: &str) -> usize {
    counts
        .split(';')
        .filter_map(|part| part.trim().strip_suffix(word))
        .filter_map(|part| part.split_whitespace().next_back()?.parse::<usize>().ok())
        .sum()
}

/// All groups of a run.
#[derive(Debug, Clone, Default)]
pub(crate) struct Summary {
    pub(crate) groups: Vec<Group>,
}

impl Summary {
    /// Whether the run is good: nothing failed, something passed, and nothing was skipped if all is `required`.
    pub(crate) fn is_good(&self, required: bool) -> bool {
        let sum = |count: fn(&Group) -> usize| self.groups.iter().map(count).sum::<usize>();
        let skipped = sum(|group| group.skips.len());
        sum(|group| group.failed) == 0 && sum(|group| group.passed) > 0 && !(required && skipped > 0)
    }
}

impl Summary {
    /// The sums of all groups, in words.
    pub(crate) fn counts(&self) -> String {
        let sum = |count: fn(&Group) -> usize| self.groups.iter().map(count).sum::<usize>();
        let (passed, failed) = (sum(|group| group.passed), sum(|group| group.failed));
        format!("{passed} passed, {failed} failed, {} skipped", sum(|group| group.skips.len()))
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for group in &self.groups {
            writeln!(
                f,
                "{:<6} {} passed, {} failed, {} skipped",
                group.name,
                group.passed,
                group.failed,
                group.skips.len()
            )?;
            for failure in &group.failures {
                writeln!(f, "       failed: {failure}")?;
            }
            for skip in &group.skips {
                writeln!(f, "       skipped: {skip}")?;
            }
        }
        writeln!(f, "{}", self.counts())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_are_summed_and_failures_named() {
        let mut group = Group::named("unit");
        for line in [
            "running 3 tests",
            "test route::tests::inside_waits ... ok",
            "test route::tests::outside_passes ... FAILED",
            "test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured; 4 filtered out; finished in 0.01s",
            "test result: ok. 7 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s",
        ] {
            group.read_line(line);
        }
        group.note_exit(false);
        assert_eq!((group.passed, group.failed, group.skips.len()), (9, 1, 1));
        assert_eq!(group.failures, ["route::tests::outside_passes"]);
    }

    #[test]
    fn a_run_that_fails_before_any_test_is_a_failure() {
        let mut group = Group::named("unit");
        group.note_exit(false);
        assert_eq!(group.failed, 1);
        assert!(!Summary { groups: vec![group] }.is_good(false));
    }

    /// So many tests have passed for libtest, and wrote these lines to a file of that name.
    fn of_skips(name: &str, passed: usize, skips: &str) -> Group {
        let file = std::env::temp_dir().join(format!("justmtls-xtask-{name}-{}", std::process::id()));
        std::fs::write(&file, skips).unwrap();
        let mut group = Group::named("e2e");
        let rest = "0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1s";
        group.read_line(&format!("test result: ok. {passed} passed; {rest}"));
        group.read_skips(&file);
        std::fs::remove_file(&file).unwrap();
        group
    }

    #[test]
    fn a_skip_is_not_a_pass_and_fails_where_all_is_required() {
        let group = of_skips("all", 2, "SKIPPED story: no tshark\nnoise\n");
        assert_eq!((group.passed, group.skips.as_slice()), (1, &["story: no tshark".to_owned()][..]));
        let summary = Summary { groups: vec![group] };
        assert!(summary.is_good(false));
        assert!(!summary.is_good(true));
        assert!(summary.to_string().ends_with("\n1 passed, 0 failed, 1 skipped\n"), "{summary}");
    }

    #[test]
    fn a_test_of_which_a_part_is_skipped_has_passed_and_fails_where_all_is_required() {
        let group = of_skips("parts", 1, "SKIPPED PART story::crash: no node\nSKIPPED PART story::tap: no node\n");
        assert_eq!((group.passed, group.failed), (1, 0));
        assert_eq!(group.skips, ["a part, story::crash: no node", "a part, story::tap: no node"]);
        let summary = Summary { groups: vec![group] };
        assert!(summary.is_good(false) && !summary.is_good(true));
    }

    #[test]
    fn a_run_without_a_single_test_is_not_good() {
        assert!(!Summary { groups: vec![Group::named("unit")] }.is_good(false));
    }
}
