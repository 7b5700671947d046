//! Pods that run already, found by the container runtime's socket.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use agent::Args;
use mesh::PodUid;
use tempfile::TempDir;
use tokio::net::UnixListener;
use wire::cri::Sandbox;
use wire::cri::double::Double;
use wire::pods::{CniResult, ToAgent};
use wire::report::CaptureFailure;

use crate::lab::{A, App, B, Client, eventually, with_privilege};
use crate::world::{Room, World, pod};

/// A node of Kubernetes as the agent's container sees it.
struct Host {
    files: TempDir,
    runtime: Double,
}

impl Host {
    fn new() -> Host {
        let host = Host::without_runtime();
        host.start_runtime();
        host
    }

    fn without_runtime() -> Host {
        let host = Host { files: tempfile::tempdir().unwrap(), runtime: Double::default() };
        for folder in ["bin", "conf"] {
            std::fs::create_dir(host.at(folder)).unwrap();
        }
        let primary = r#"{"cniVersion":"1.0.0","name":"net","plugins":[{"type":"ptp"}]}"#;
        std::fs::write(host.at("conf/10-net.conflist"), primary).unwrap();
        std::fs::write(host.at("bin/ptp"), "the primary's own plugin").unwrap();
        host
    }

    fn start_runtime(&self) {
        let (runtime, socket) = (self.runtime.clone(), self.at("cri.sock"));
        std::thread::spawn(move || {
            let events = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            events.block_on(async { runtime.serve(UnixListener::bind(socket).unwrap()).await }).unwrap();
        });
        eventually("the container runtime listens", || self.at("cri.sock").exists());
    }

    fn at(&self, name: &str) -> PathBuf {
        self.files.path().join(name)
    }

    fn set(&self, args: &mut Args) {
        args.cluster.kubernetes = true;
        args.cluster.cri_socket = vec![self.at("none.sock"), self.at("cri.sock")];
        // Where the rooms of tests are.
        args.cluster.netns_dir = "/proc".into();
        args.cluster.cni_bin_dir = Some(self.at("bin"));
        args.cluster.cni_conf_dir = Some(self.at("conf"));
    }

    /// The runtime has a pod's sandbox, made at that time.
    fn runs(&self, name: &str, room: &Room, created: SystemTime) {
        let below = room.path.strip_prefix("/proc").unwrap();
        let sandbox = Sandbox {
            id: format!("sandbox-of-{name}"),
            pod: PodUid::from(name),
            namespace: "shop".into(),
            name: name.into(),
            attempt: 0,
            ready: true,
            created_at: created.duration_since(UNIX_EPOCH).unwrap().as_nanos() as i64,
        };
        self.runtime.has(vec![(sandbox, Some(Path::new("/run/netns").join(below)))]);
    }
}

fn number(world: &World, name: &str) -> String {
    let page = world.page("/metrics");
    let line = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {name} in {page}")).to_owned()
}

/// With a control plane that names pod a, and a proxy.
fn started(host: &Host) -> (World, crate::world::FakeProxy) {
    let world = World::new(|args| host.set(args));
    world.control.publish([pod("a", A)]);
    let proxy = world.proxy();
    eventually("the plugin is in place", || world.page("/plugin").contains(r#""state":"in-place""#));
    (world, proxy)
}

#[test]
fn a_pod_that_ran_before_is_captured_and_what_it_has_open_goes_on() {
    with_privilege(a_pod_that_ran_before_is_captured_and_what_it_has_open_goes_on, || {
        let host = Host::new();
        let (world, proxy) = started(&host);
        let _app = App::start(&world.lab.b, B[0], 8080);
        let mut client = Client::connect(&world.lab.a, B[0], 8080).unwrap();
        client.seen().unwrap();
        let room = Room::of(&world.lab.a);
        host.runs("a", &room, SystemTime::now() - Duration::from_secs(3600));
        let (added, _listeners) = proxy.added();
        assert_eq!(added.pod, PodUid::from("a"));
        proxy.say(&ToAgent::PodReady { pod: added.pod });
        eventually("it is captured", || world.page("/pods").contains(r#""state":"captured""#));
        client.echo().unwrap();
        assert_eq!(number(&world, "justmtls_agent_missed_pods_total"), "0");
        assert!(world.page("/readyz").starts_with("HTTP/1.1 200"));
    });
}

#[test]
fn an_agent_is_ready_when_the_runtime_has_answered_and_says_why_it_is_not() {
    with_privilege(an_agent_is_ready_when_the_runtime_has_answered_and_says_why_it_is_not, || {
        let host = Host::without_runtime();
        let (world, _proxy) = started(&host);
        let why = format!("no container runtime listens at {}", host.at("none.sock").display());
        eventually("it is said why", || world.page("/readyz").contains(&why));
        let rest = [r#""pods_named":true"#, r#""plugin":true"#, r#""proxy":true"#, r#""pending":[]"#];
        eventually("it lacks nothing else", || rest.iter().all(|word| world.page("/readyz").contains(word)));
        assert!(world.page("/readyz").starts_with("HTTP/1.1 503"));
        host.start_runtime();
        eventually("it is ready", || world.page("/readyz").starts_with("HTTP/1.1 200"));
        assert!(world.page("/readyz").contains(r#""runtime_failure":null"#));
    });
}

#[test]
fn a_pod_that_the_plugin_missed_is_captured_and_what_it_had_open_is_ended() {
    with_privilege(a_pod_that_the_plugin_missed_is_captured_and_what_it_had_open_is_ended, || {
        let host = Host::new();
        let (world, proxy) = started(&host);
        let _app = App::start(&world.lab.b, B[0], 8080);
        let mut client = Client::connect(&world.lab.a, B[0], 8080).unwrap();
        client.seen().unwrap();
        client.echo().unwrap();
        let room = Room::of(&world.lab.a);
        host.runs("a", &room, SystemTime::now() + Duration::from_secs(3600));
        let (added, _listeners) = proxy.added();
        proxy.say(&ToAgent::PodReady { pod: added.pod });
        assert_eq!(client.end(), ErrorKind::ConnectionAborted);
        eventually("it is counted", || number(&world, "justmtls_agent_missed_connections_ended_total") == "1");
        assert_eq!(number(&world, "justmtls_agent_missed_pods_total"), "1");
        assert!(world.page("/events").contains(r#""event":"missed-add""#));
    });
}

#[test]
fn a_pod_that_runs_and_cannot_be_captured_is_reported_until_it_is() {
    with_privilege(a_pod_that_runs_and_cannot_be_captured_is_reported_until_it_is, || {
        let host = Host::new();
        let (world, proxy) = started(&host);
        // Of another pod, by its addresses.
        let other = Room::of(&world.lab.b);
        host.runs("a", &other, SystemTime::now() - Duration::from_secs(3600));
        let failed = |why| [(PodUid::from("a"), why)].into();
        eventually("it is reported", || world.control.failed() == failed(CaptureFailure::NotItsAddress));
        assert!(world.control.captured().is_empty());
        // The runtime has made it anew.
        host.runtime.has(Vec::new());
        let room = Room::of(&world.lab.a);
        let answer = world.add("a", &room);
        let (added, _listeners) = proxy.added();
        proxy.say(&ToAgent::PodReady { pod: added.pod });
        assert_eq!(answer.join().unwrap(), CniResult::Captured);
        eventually("it is captured, and that is over", || {
            world.control.captured() == [PodUid::from("a")].into() && world.control.failed().is_empty()
        });
    });
}
