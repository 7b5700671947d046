//! The story that one command tells, for root and for an ordinary user: its own loads take the whole machine, so it runs alone.

#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use e2e::{Machine, Program, as_ordinary_user, binary, needs};

/// What one command is promised to take at most, on a machine of its own.
const A_MINUTE: Duration = Duration::from_secs(60);

/// Lets the story be told, and reads it; the whole of it is within the promised time.
fn tell_story(program: impl Fn(&Path) -> Program) {
    let before = Machine::now();
    let folder = tempfile::Builder::new().prefix("justmtls-e2e-").tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    // Cargo's folder may lie where only its owner can go.
    let copy = folder.path().join("justmtls");
    fs::copy(binary(), &copy).unwrap();
    let state = folder.path().join("state");
    let told = program(&copy).args(["demo", "--once", "--json", "--state"]).args([&state]).within(A_MINUTE).run();
    println!("told in {:.1?}", told.took);
    let steps: Vec<serde_json::Value> = told.ok().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(steps.len() >= 5 && steps.iter().all(|step| step["ok"] == true), "{steps:#?}");
    let of = |name: &str| &steps.iter().find(|step| step["step"] == name).expect("a step of the story")["facts"];
    // The wiretap sees the secret before capture, and not afterwards.
    assert!(of("before")["secret_found"].as_u64() > Some(0) && of("after")["secret_found"] == 0, "{steps:#?}");
    // Nothing of what happens under load is seen by a connection that begins afterwards; only a proxy has what is open.
    for step in ["rotation", "control-killed", "agent-killed", "proxy-killed"] {
        let facts = of(step);
        let (ok, failed) = (facts["short_ok"].as_u64(), facts["short_failed_after"].as_u64());
        assert!(ok >= Some(500) && failed == Some(0), "{step}: {facts:#}");
        assert!(step == "proxy-killed" || facts["short_failed"] == 0, "{step}: {facts:#}");
    }
    assert!(!state.exists());
    assert_eq!(Machine::now(), before);
}

#[test]
fn the_story_succeeds_for_root() {
    needs!("root");
    tell_story(|binary| Program::new(binary));
}

#[test]
fn the_story_succeeds_for_an_ordinary_user() {
    needs!("user-namespaces");
    tell_story(as_ordinary_user);
}
