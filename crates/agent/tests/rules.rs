//! The rendered rules of a pod, against files that a person has read.
//!
//! `UPDATE_GOLDEN=1 cargo test -p agent --test rules` writes them anew.

use std::path::Path;

use agent::rules::{CapturePlan, Marks, delivery, draining, ruleset};
use linux::nft::{Expression, LONGEST_COMMENT, Table};

fn plan() -> CapturePlan {
    CapturePlan {
        marks: Marks { outer: 0x6a6d_0001, inner: 0x6a6d_0002 },
        addresses: ["10.88.16.5".parse().unwrap(), "fd88:16::5".parse().unwrap()].into(),
        excluded_in: [9100].into(),
        excluded_out: [22, 5432].into(),
    }
}

#[track_caller]
fn is_golden(table: &Table, name: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    let text = table.to_string();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text, golden, "{name} differs: UPDATE_GOLDEN=1 writes it anew");
}

#[test]
fn a_captured_pod_has_these_rules() {
    is_golden(&ruleset(&plan()), "captured.nft");
}

#[test]
fn a_pod_that_is_released_has_these_rules() {
    is_golden(&draining(&plan()), "draining.nft");
}

#[test]
fn every_rule_has_a_reason_that_the_kernel_stores_whole() {
    for table in [ruleset(&plan()), draining(&plan())] {
        for rule in table.chains.iter().flat_map(|chain| &chain.rules) {
            assert!(!rule.why.is_empty() && rule.why.len() <= LONGEST_COMMENT, "{rule}");
            assert!(rule.why.is_ascii() && !rule.why.contains('"'), "{rule}");
        }
    }
}

/// Another segment than a SYN belongs to a connection that is open, maybe from before capture.
#[test]
fn only_segments_that_open_a_connection_are_redirected_or_refused() {
    for rule in ruleset(&plan()).chains.iter().flat_map(|chain| &chain.rules) {
        let judges = rule
            .expressions
            .iter()
            .any(|it| matches!(it, Expression::Redirect(_) | Expression::DnatPort(_) | Expression::RejectWithReset));
        assert!(!judges || rule.expressions.contains(&Expression::TcpSyn), "{rule}");
    }
}

#[test]
fn marks_are_different_for_each_pod_and_never_nothing() {
    let all: Vec<Marks> = (0..100).map(|_| Marks::random().unwrap()).collect();
    for (index, marks) in all.iter().enumerate() {
        assert!(marks.outer != 0 && marks.inner != 0 && marks.outer != marks.inner);
        assert!(!all[..index].contains(marks));
        assert_eq!(delivery(*marks).mark, marks.inner);
    }
}
