//! What one check came to, and how all of them are shown.

use serde_json::{Value, json};

use super::ids::Id;
use crate::cluster::is_refusal;
use crate::table::printable;

/// What a check came to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum State {
    Ok,
    Warning,
    Failed,
}

impl State {
    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failed => "failed",
        }
    }
}

/// What to do about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Advice {
    /// What the check says.
    OfCheck,
    /// Nothing is wrong but the permissions of who checks.
    Permission,
    /// Something in particular.
    Other(&'static str),
}

/// One check, made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Finding {
    pub(super) id: Id,
    pub(super) state: State,
    /// What was found, or what is wrong, in a sentence without an end.
    pub(super) message: String,
    advice: Advice,
}

impl Finding {
    fn new(id: Id, state: State, message: String) -> Self {
        // What the API server refuses to whoever checks is no fault of what is checked.
        let advice = if is_refusal(&message) { Advice::Permission } else { Advice::OfCheck };
        Self { id, state, message, advice }
    }

    /// The same, where the cause is what whoever checks may not do.
    pub(super) fn of_permission(self) -> Self {
        Self { advice: Advice::Permission, ..self }
    }

    /// The same, with something else to do about it than for most findings of its check.
    pub(super) fn advised(self, what: &'static str) -> Self {
        Self { advice: Advice::Other(what), ..self }
    }

    fn hint(&self) -> &'static str {
        match self.advice {
            Advice::OfCheck => self.id.hint(),
            Advice::Permission => "check as somebody who may do that, or have whoever checks be given that permission",
            Advice::Other(what) => what,
        }
    }

    fn documentation(&self) -> &'static str {
        match self.advice {
            Advice::Permission => "SPECIFICATION.md#permissions",
            Advice::OfCheck | Advice::Other(_) => self.id.documentation(),
        }
    }
}

pub(super) fn ok(id: Id, message: impl Into<String>) -> Finding {
    Finding::new(id, State::Ok, message.into())
}

pub(super) fn warning(id: Id, message: impl Into<String>) -> Finding {
    Finding::new(id, State::Warning, message.into())
}

pub(super) fn failed(id: Id, message: impl Into<String>) -> Finding {
    Finding::new(id, State::Failed, message.into())
}

/// The best findings of one id: what is wrong, one by one; or, where nothing is, one sentence.
pub(super) fn all_or(id: Id, wrong: Vec<Finding>, right: impl Into<String>) -> Vec<Finding> {
    if wrong.is_empty() { vec![ok(id, right)] } else { wrong }
}

pub(super) fn worst(findings: &[Finding]) -> State {
    findings.iter().map(|finding| finding.state).max().unwrap_or(State::Ok)
}

/// 0 where all is well, 1 where something failed and 2 where there are warnings alone.
pub(super) fn exit_status(findings: &[Finding]) -> i32 {
    match worst(findings) {
        State::Ok => 0,
        State::Failed => 1,
        State::Warning => 2,
    }
}

pub(super) fn as_json(findings: &[Finding]) -> Value {
    let one = |finding: &Finding| {
        let hint = (finding.state != State::Ok).then(|| finding.hint());
        json!({
            "id": finding.id.as_str(),
            "group": finding.id.group().as_str(),
            "state": finding.state.as_str(),
            "message": finding.message,
            "hint": hint,
            "documentation": finding.documentation(),
        })
    };
    json!({ "state": worst(findings).as_str(), "checks": findings.iter().map(one).collect::<Vec<_>>() })
}

pub(super) fn print(findings: &[Finding]) {
    use anstyle::{AnsiColor, Style};
    let (mut group, bold) = (None, Style::new().bold());
    for finding in findings {
        if group != Some(finding.id.group()) {
            group = Some(finding.id.group());
            anstream::println!("{bold}{}{bold:#}", finding.id.group().as_str());
        }
        let (colour, mark) = match finding.state {
            State::Ok => (AnsiColor::Green, "√"),
            State::Warning => (AnsiColor::Yellow, "!"),
            State::Failed => (AnsiColor::Red, "×"),
        };
        let colour = colour.on_default();
        anstream::println!("{colour}{mark}{colour:#} {}: {}", finding.id.as_str(), printable(&finding.message));
        if finding.state != State::Ok {
            anstream::println!("    {}; see {}", finding.hint(), finding.documentation());
        }
    }
    let of = |state: State| findings.iter().filter(|finding| finding.state == state).count();
    anstream::println!();
    anstream::println!("{} ok, {} warnings, {} failed", of(State::Ok), of(State::Warning), of(State::Failed));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_status_is_that_of_the_worst() {
        let (fine, odd, bad) = (ok(Id::Installed, "a"), warning(Id::Installed, "b"), failed(Id::Installed, "c"));
        assert_eq!(exit_status(std::slice::from_ref(&fine)), 0);
        assert_eq!(exit_status(&[fine.clone(), odd.clone()]), 2);
        assert_eq!(exit_status(&[fine, odd, bad]), 1);
    }

    #[test]
    fn programs_get_the_name_the_group_and_what_to_do() {
        let text = as_json(&[failed(Id::Installed, "no"), ok(Id::ApiReachable, "yes")]);
        assert_eq!(text["state"], "failed");
        assert_eq!(text["checks"][0]["id"], "installed");
        assert_eq!(text["checks"][0]["group"], "objects");
        assert!(text["checks"][0]["hint"].as_str().unwrap().contains("justmtls install"));
        assert!(text["checks"][1]["hint"].is_null());
    }

    #[test]
    fn what_whoever_checks_may_not_do_is_no_reason_to_install_anything() {
        let refused =
            failed(Id::Installed, crate::cluster::of_status(403, "namespaces is forbidden: User \"a\" cannot get it"));
        for finding in [refused, warning(Id::ObjectsAsRendered, "x").of_permission()] {
            assert!(
                finding.hint().contains("permission") && !finding.hint().contains("justmtls"),
                "{}",
                finding.hint()
            );
            assert_eq!(finding.documentation(), "SPECIFICATION.md#permissions");
        }
        assert_eq!(failed(Id::Installed, "x").advised("wait").hint(), "wait");
    }
}
