//! The box keeps the product's processes running, as a cluster would: what is killed is started again, and named.

#![forbid(unsafe_code)]

use std::fs;
use std::process::{Child, Command, Stdio};

use e2e::{Cluster, PATIENCE, binary, eventually, is_gone, needs, text, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const MESH: &str = include_str!("../manifests/mesh.yaml");

#[test]
fn a_killed_process_is_started_again_and_the_status_says_how_often() {
    needs!("root");
    let cluster = Cluster::start(MESH);
    for name in ["control", "agent@node-a", "node-a"] {
        let before = &cluster.process_entries(name)[0];
        assert_eq!((before["restarts"].as_u64(), before["lastExit"].as_str()), (Some(0), None), "{before:#}");
        // By somebody who knows nothing of the box, and then by its verb.
        let old = cluster.process(name);
        kill(old, Signal::SIGKILL).unwrap();
        let first = cluster.replaced(name, old);
        let second = cluster.kill(name);
        assert_eq!(first.new, second.old);
        let entries = cluster.process_entries(name);
        assert_eq!(entries.len(), 1, "{entries:#?}");
        let after = &entries[0];
        assert_eq!(text(after, "state"), "running");
        assert_eq!((after["restarts"].as_u64(), text(after, "lastExit")), (Some(2), "killed by SIGKILL"));
        let shown = cluster.verb(&["status"]).run().ok();
        assert!(shown.contains("restarts: 2, last exit: killed by SIGKILL"), "{shown}");
    }
    // The others have noticed nothing.
    assert_eq!(cluster.process_entries("node-b")[0]["restarts"], 0);
}

#[test]
fn a_process_that_is_held_down_stays_down_until_it_is_resumed() {
    needs!("root");
    let cluster = Cluster::start(MESH);
    let old = cluster.hold("agent@node-b");
    let held = &cluster.process_entries("agent@node-b")[0];
    assert_eq!((text(held, "state"), text(held, "lastExit")), ("held", "killed by SIGKILL"));
    assert!(held["pid"].is_null(), "{held:#}");
    let status = cluster.status();
    assert!(status["problems"].to_string().contains("held down"), "{:#}", status["problems"]);
    for (verb, sentence) in [("kill", "held down already"), ("upgrade", "does not run")] {
        let refused = cluster.verb(&[verb, "agent@node-b"]).run().fails();
        assert!(refused.contains(sentence) && refused.contains("resume"), "{refused}");
    }
    let new = cluster.resume("agent@node-b");
    assert_ne!(old, new);
    let refused = cluster.verb(&["resume", "agent@node-b"]).run().fails();
    assert!(refused.contains("agent@node-b runs"), "{refused}");
    assert!(!cluster.status()["problems"].to_string().contains("held down"));
}

#[test]
fn an_upgrade_starts_the_new_process_before_it_ends_the_old_one() {
    needs!("root");
    let cluster = Cluster::start(MESH);
    let proxy = cluster.upgrade("node-b");
    // It drains beside the new one, or has nothing to drain.
    eventually("the old proxy to end", PATIENCE, || is_gone(proxy.old));
    assert!(!is_gone(proxy.new));
    wait_until("one process to be left", PATIENCE, || {
        let all = cluster.process_entries("node-b/draining");
        if all.is_empty() { Ok(()) } else { Err(format!("{all:#?}")) }
    });
    // An upgrade is no restart.
    assert_eq!(cluster.process_entries("node-b")[0]["restarts"], 0);
}

#[test]
fn a_new_process_that_does_not_get_ready_leaves_the_old_one_where_it_is() {
    needs!("root");
    let cluster = Cluster::start(MESH);
    let before = cluster.process("node-b");
    let refused = cluster.try_upgrade("node-b", &["--binary", "/bin/false"]).fails();
    assert!(refused.contains("exit status 1") && refused.contains("before it was ready"), "{refused}");
    assert_eq!(cluster.process("node-b"), before);
    assert_eq!(cluster.process_entries("node-b")[0]["restarts"], 0);
    let refused = cluster.try_upgrade("node-b", &["--binary", "/no/such/file"]).fails();
    assert!(refused.contains("/no/such/file"), "{refused}");
    let refused = cluster.try_upgrade("control", &[]).fails();
    assert!(refused.contains("kill control"), "{refused}");
}

#[test]
fn a_process_that_does_not_exist_is_answered_with_those_that_do() {
    needs!("root");
    let cluster = Cluster::start(MESH);
    for verb in ["kill", "resume", "upgrade"] {
        let refused = cluster.verb(&[verb, "node-z"]).run().fails();
        assert!(refused.contains("node-z") && refused.contains("agent@node-a, node-a"), "{refused}");
    }
    // The proxy has two names.
    let old = cluster.process("node-a");
    cluster.verb(&["kill", "proxy@node-a"]).run().ok();
    cluster.replaced("node-a", old);
}

/// The first process of a container of ours, without a container: ended with the test.
struct Supervisor(Child);

impl Supervisor {
    fn of(arguments: &[&str]) -> Self {
        let mut command = Command::new(binary());
        command.arg("supervise").args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        Self(command.spawn().expect("the binary starts"))
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.0.id() as i32)
    }

    fn child(&self) -> Option<Pid> {
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.0.id())).ok()?;
        children.split_whitespace().next()?.parse().ok().map(Pid::from_raw)
    }

    /// Kills so many children, one after the other; the last of them.
    fn kill_children(&self, times: usize) -> Option<Pid> {
        (0..times).fold(None, |old, _| {
            let child = self.wait_for_child(old);
            kill(child, Signal::SIGKILL).unwrap();
            Some(child)
        })
    }

    /// Waits for a child that is not `old` and has lived for longer than one that dies at its start.
    fn wait_for_child(&self, old: Option<Pid>) -> Pid {
        let mut seen = std::time::Instant::now();
        let mut child = None;
        wait_until("another child that lives", PATIENCE, || {
            let now = self.child().filter(|it| Some(*it) != old);
            if now != child {
                (child, seen) = (now, std::time::Instant::now());
            }
            match child {
                Some(child) if seen.elapsed().as_millis() > 1100 => Ok(child),
                other => Err(format!("{other:?}")),
            }
        })
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        let child = self.child();
        let _ = self.0.kill();
        let _ = self.0.wait();
        // As its container would.
        if let Some(child) = child {
            let _ = kill(child, Signal::SIGKILL);
        }
    }
}

/// A load of nothing, which waits for words.
const IDLE: &[&str] = &["demo-app", "load", "--to", "127.0.0.1:1", "--short", "0", "--controlled"];

#[test]
fn what_is_supervised_is_started_again_when_it_is_killed_and_ends_when_it_is_told_to() {
    let mut supervisor = Supervisor::of(IDLE);
    let killed = supervisor.kill_children(2);
    let last = supervisor.wait_for_child(killed);
    let status = fs::read_to_string(format!("/proc/{last}/status")).unwrap();
    assert!(status.contains("SigBlk:\t0000000000000000"), "what tells it to end reaches it: {status}");
    // To wait for a process closes its input, at whose end this one would end, too.
    let _input = supervisor.0.stdin.take();
    kill(supervisor.pid(), Signal::SIGTERM).unwrap();
    assert_eq!(supervisor.0.wait().unwrap().code(), Some(128 + Signal::SIGTERM as i32));
    assert!(is_gone(last));
}

#[test]
fn what_is_supervised_and_dies_again_and_again_or_at_its_start_is_left_to_who_counts() {
    let mut supervisor = Supervisor::of(IDLE);
    supervisor.kill_children(4);
    assert_eq!(supervisor.0.wait().unwrap().code(), Some(137));
    let mut wrong = Supervisor::of(&["proxy", "--no-such-flag"]);
    assert_eq!(wrong.0.wait().unwrap().code(), Some(2));
}
