//! THE REPOSITORY CHECKS ITS OWN SHAPE: rules that a compiler cannot hold and a reviewer forgets.
//!
//! The tree is read once ([`tree`]); each rule is a function from the tree to violations. A violation is one line:
//! where, what, and what to do.

mod docs;
mod features;
mod house;
mod lexer;
mod modules;
mod source;
mod tree;

use anyhow::Result;
use std::fmt;
use std::path::Path;
use std::process::ExitCode;
use tree::Tree;

/// One breach of a rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Violation {
    file: String,
    /// Counted from 1; 0 is the file as a whole.
    line: usize,
    what: String,
    remedy: String,
}

impl Violation {
    fn new(file: &str, line: usize, what: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { file: file.to_owned(), line, what: what.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}: {}", self.file, self.line.max(1), self.what, self.remedy)
    }
}

type Rule = fn(&Tree) -> Vec<Violation>;

const RULES: &[Rule] = &[
    house::dependency_direction,
    house::pure_crates,
    house::pure_code,
    house::dependencies_are_used,
    house::unsafe_is_forbidden,
    modules::every_file_is_reached,
    modules::every_module_says_what_it_is,
    source::files_are_short,
    source::unsafe_stays_in_its_room,
    source::unsafe_gives_its_reason,
    source::verifiers_stay_in_their_room,
    source::no_unfinished_work,
    source::no_sleeping_tests,
    source::no_machine_paths,
    docs::promises_name_tests,
    docs::cited_rules_are_explained,
    docs::closed_sets_are_complete,
    docs::the_map_is_true,
    docs::links_lead_somewhere,
];

/// Checks the tree and prints each violation; the exit status says whether there was one.
pub(crate) fn run(root: &Path) -> Result<ExitCode> {
    let tree = Tree::read(root)?;
    let mut violations: Vec<Violation> = RULES.iter().flat_map(|rule| rule(&tree)).collect();
    violations.extend(features::are_the_same_for_all_selections(root)?);
    violations.sort();
    violations.dedup();
    for violation in &violations {
        println!("{violation}");
    }
    println!("tidy: {} files, {} rules, {} violations", tree.files.len(), RULES.len() + 1, violations.len());
    Ok(if violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
