//! The box itself: it comes up for root and for an ordinary user, passes through what programs say, and leaves nothing.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use e2e::{Cluster, Family, Machine, Owner, PATIENCE, Program, Running, binary, eventually, needs, secret, wait_until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const MESH: &str = include_str!("../manifests/mesh.yaml");
/// How long a box may take to end.
const STOPPED: Duration = Duration::from_secs(60);

/// A box in the foreground, as a person starts it.
struct Foreground {
    folder: tempfile::TempDir,
    running: Running,
    /// Every process in it, starter and all.
    processes: Vec<u32>,
}

impl Foreground {
    fn start() -> Foreground {
        let folder = tempfile::Builder::new().prefix("justmtls-e2e-").tempdir().unwrap();
        fs::write(folder.path().join("mesh.yaml"), MESH).unwrap();
        let state = folder.path().join("state");
        let running = Program::new(binary())
            .args(["demo", "--state"])
            .args([&state])
            .args(["--manifests"])
            .args([folder.path().join("mesh.yaml")])
            .spawn();
        wait_until("the box to be ready", Duration::from_secs(40), || {
            let status = demo(&state, &["status", "--json"]).run();
            if status.success() && status.stdout.contains("\"ready\": true") {
                Ok(())
            } else {
                Err(format!("{status}{}{}", running.stdout(), running.stderr()))
            }
        });
        let processes = descendants(running.pid());
        assert!(processes.len() > 5, "a box has more processes than {processes:?}");
        Foreground { folder, running, processes }
    }

    fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    /// A dead child that nobody has waited for yet holds nothing.
    fn is_gone(&self) -> bool {
        self.processes.iter().all(|pid| state_of(*pid) == 'Z')
    }

    fn assert_nothing_is_left(&self, before: &Machine) {
        eventually("all its processes to be gone", Duration::from_secs(12), || self.is_gone());
        assert_eq!(Machine::now(), *before);
    }
}

fn demo(state: &Path, arguments: &[&str]) -> Program {
    Program::new(binary()).args(["demo", "--state"]).args([state]).args(arguments)
}

fn pid(number: u32) -> Pid {
    Pid::from_raw(number.cast_signed())
}

/// A process' state as the kernel writes it; `Z` also for one that is gone.
fn state_of(pid: u32) -> char {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("State:"));
    line.and_then(|line| line.trim().chars().next()).unwrap_or('Z')
}

fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists.flat_map(|list| list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>()).collect()
}

fn descendants(pid: Pid) -> Vec<u32> {
    let mut all = vec![pid.as_raw().cast_unsigned()];
    let mut at = 0;
    while let Some(pid) = all.get(at) {
        all.extend(children(*pid));
        at += 1;
    }
    all
}

#[test]
fn ctrl_c_leaves_nothing() {
    needs!("root");
    let before = Machine::now();
    let foreground = Foreground::start();
    foreground.running.signal(Signal::SIGINT);
    eventually("its state directory to be gone", Duration::from_secs(15), || !foreground.state().exists());
    foreground.assert_nothing_is_left(&before);
}

#[test]
fn kill_9_of_the_first_or_the_second_process_leaves_nothing() {
    needs!("root");
    let before = Machine::now();
    // The starter, and the box's own init.
    for number in [0, 1] {
        let foreground = Foreground::start();
        kill(pid(foreground.processes[number]), Signal::SIGKILL).unwrap();
        eventually("its state directory to be gone", Duration::from_secs(15), || !foreground.state().exists());
        foreground.assert_nothing_is_left(&before);
    }
}

#[test]
fn what_is_killed_altogether_is_cleaned_by_the_next_start_or_stop() {
    needs!("root");
    let before = Machine::now();
    for verb in [&["stop"][..], &["start"]] {
        let foreground = Foreground::start();
        // All at once: nobody is left to clean up.
        let [starter, init] = [0, 1].map(|number| pid(foreground.processes[number]));
        kill(starter, Signal::SIGSTOP).unwrap();
        kill(init, Signal::SIGKILL).unwrap();
        kill(starter, Signal::SIGKILL).unwrap();
        eventually("all its processes to be gone", Duration::from_secs(10), || foreground.is_gone());
        assert!(foreground.state().exists(), "somebody cleaned up who should be dead");
        demo(&foreground.state(), verb).within(STOPPED).run().ok();
        demo(&foreground.state(), &["stop"]).run().ok();
        assert!(!foreground.state().exists());
        foreground.assert_nothing_is_left(&before);
    }
}

#[test]
fn two_boxes_live_side_by_side_and_a_directory_in_use_is_refused() {
    needs!("root");
    let before = Machine::now();
    {
        let boxes = [Cluster::start(MESH), Cluster::start(MESH)];
        for (number, cluster) in boxes.iter().enumerate() {
            let _server = cluster.serve("app/server", &["name", "7000", &format!("box-{number}")]);
            let server = cluster.address("app/server", Family::V4).to_string();
            let said = cluster.tcp("app/client", &["look", &server, "7000"]).run().ok();
            assert!(said.starts_with(&format!("said box-{number} ")), "{said}");
        }
        let refusal = boxes[0].verb(&["start"]).run().fails();
        for part in ["in use by process", "justmtls demo stop --state", "--state"] {
            assert!(refusal.contains(part), "no {part:?} in: {refusal}");
        }
    }
    assert_eq!(Machine::now(), before);
}

#[test]
fn an_ordinary_users_box_speaks_mtls_too() {
    needs!("user-namespaces");
    let cluster = Cluster::start_as(Owner::Ordinary, MESH);
    assert_eq!(cluster.status()["authority"], "user");
    let _server = cluster.serve("app/server", &["echo", "7000"]);
    for family in Family::BOTH {
        let server = cluster.address("app/server", family).to_string();
        let said = cluster.tcp("app/client", &["ask", &server, "7000", "hello"]).run().ok();
        assert!(said.starts_with("said hello "), "{family:?}: {said}");
    }
    cluster.wait_edge("node-b", ["inbound", "app/client", "app/server", "7000", "mtls", ""]);
    let refusal = cluster.exec_with(&["--user", "1000"], "app/client", &["true"]).run().fails();
    assert!(refusal.contains("needs a box of root"), "{refusal}");
}

#[test]
fn exec_passes_input_output_status_and_signals_through() {
    needs!("root");
    let cluster = Cluster::start(MESH);
    let copied = cluster.exec("app/client", &["sh", "-c", "cat; echo complaint >&2; exit 7"]).input("some input").run();
    assert_eq!(
        (copied.status.code(), copied.stdout.as_str(), copied.stderr.trim()),
        (Some(7), "some input", "complaint")
    );
    // A shell cannot trap a signal that was ignored when it began, as it is below a job in the background.
    let trap = "trap 'echo interrupted; exit 3' INT; echo ready; while true; do sleep 0.1; done";
    let mut trapped = cluster.exec("app/client", &["env", "--default-signal=INT", "sh", "-c", trap]).spawn();
    trapped.wait_for("ready");
    trapped.signal(Signal::SIGINT);
    let ended = trapped.finish(PATIENCE);
    assert_eq!((ended.status.code(), ended.stdout.as_str()), (Some(3), "ready\ninterrupted\n"));
    let mut untrapped = cluster.exec("app/client", &["sh", "-c", "echo ready; exec sleep 1000"]).spawn();
    untrapped.wait_for("ready");
    untrapped.signal(Signal::SIGTERM);
    assert_eq!(untrapped.finish(PATIENCE).status.code(), Some(128 + Signal::SIGTERM as i32));
    assert_eq!(cluster.exec("app/client", &["no-such-program"]).run().status.code(), Some(127));
    let user = cluster.exec_with(&["--user", "1234"], "app/client", &["id", "-u"]).run().ok();
    assert_eq!(user.trim(), "1234");
}

#[test]
fn a_pods_programs_run_as_the_user_that_it_names() {
    needs!("root");
    let cluster = Cluster::start(MESH);
    cluster.apply(
        "apiVersion: v1\nkind: Pod\nmetadata: {name: modest, namespace: app}\n\
         spec: {nodeName: node-a, securityContext: {runAsUser: 1234, runAsGroup: 5678}, containers: [{name: idle, command: [sleep, infinity]}]}\n",
    );
    cluster.wait_ready();
    let ids =
        cluster.exec("app/modest", &["sh", "-c", "id -u; id -g; stat -c %u:%g /proc/$(pgrep -n -x sleep)"]).run().ok();
    assert_eq!(ids, "1234\n5678\n1234:5678\n");
}

#[test]
fn the_proxy_holds_no_capability() {
    needs!("root");
    let cluster = Cluster::start(MESH);
    for node in ["node-a", "node-b"] {
        let pid = cluster.process(node);
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field =
            |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim().to_owned();
        for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
            assert_eq!(u64::from_str_radix(&field(set), 16), Ok(0), "{node} {set}");
        }
        assert_eq!(field("NoNewPrivs:"), "1", "{node}");
        let users: BTreeSet<_> = field("Uid:").split_whitespace().map(str::to_owned).collect();
        assert!(users.len() == 1 && !users.contains("0"), "{node} runs as {users:?}");
        // Not dumpable: nobody of the same user may read its memory, so its files in /proc are root's.
        assert_eq!(fs::metadata(format!("/proc/{pid}/mem")).unwrap().uid(), 0, "{node}");
    }
}

#[test]
fn no_private_key_is_on_disk_but_the_intermediates() {
    needs!("root");
    let cluster = Cluster::start(MESH);
    let search = [
        "grep",
        "--recursive",
        "--files-with-matches",
        "--no-messages",
        "--exclude-dir=bin",
        "PRIVATE KEY",
        "/run/justmtls",
    ];
    let found = cluster.on_node("node-a", &search).run();
    let files: Vec<_> = found.stdout.lines().collect();
    assert!(files.len() == 1 && files[0].ends_with("/intermediate.key"), "{found}");
}

#[test]
fn a_workloads_private_key_is_in_its_proxys_memory_alone() {
    needs!("root");
    let cluster = Cluster::start(MESH);
    let _server = cluster.serve("app/server", &["echo", "7000"]);
    let server = cluster.address("app/server", Family::V4).to_string();
    let said = cluster.tcp("app/client", &["ask", &server, "7000", "hello"]).run().ok();
    assert!(said.starts_with("said hello"), "{said}");
    // What the agent holds for the next proxy, sealed and unread, tells the test which keys there are.
    let agent = cluster.process("agent@node-a");
    let keys = wait_until("the estate of node-a's proxy", PATIENCE, || match secret::keys_held_by(agent) {
        none if none.is_empty() => Err("no key".to_owned()),
        keys => Ok(keys),
    });
    let proxy = cluster.process("node-a");
    let of_its_proxy = secret::memory(proxy);
    for key in &keys {
        assert!(key.is_plain_in(&of_its_proxy), "what is not found where it must be is not found elsewhere either");
        assert!(!key.is_text_in(&of_its_proxy), "the text that was sealed is wiped");
    }
    for name in ["agent@node-a", "node-b", "agent@node-b", "control"] {
        let memory = secret::memory(cluster.process(name));
        assert!(keys.iter().all(|key| !key.is_in(&memory)), "the memory of {name} has a key of node-a's proxy");
    }
    for page in ["/certificates", "/workloads", "/connections", "/coverage", "/metrics", "/readyz"] {
        let page = cluster.page("node-a", page);
        assert!(keys.iter().all(|key| !key.is_in(page.as_bytes())), "{page}");
    }
    let of_node = PathBuf::from(format!("/proc/{agent}/root/run/justmtls"));
    let files: Vec<_> = [cluster.state(), of_node].iter().flat_map(|folder| secret::files_below(folder)).collect();
    let logs = files.iter().filter(|(path, text)| path.extension().is_some_and(|it| it == "log") && !text.is_empty());
    assert!(logs.count() > 3, "the logs are among them: {:?}", files.iter().map(|(path, _)| path).collect::<Vec<_>>());
    for (path, text) in &files {
        assert!(keys.iter().all(|key| !key.is_in(text)), "{} has a key of node-a's proxy", path.display());
    }
}

#[test]
fn a_deleted_pod_leaves_no_socket_in_the_proxy() {
    needs!("root");
    let cluster = Cluster::start(MESH);
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: passing, namespace: app}\n\
               spec: {nodeName: node-b, serviceAccountName: server, containers: [{name: idle, command: [sleep, infinity]}]}\n";
    let holders = [cluster.process("node-b"), cluster.process("agent@node-b")];
    let descriptors = || holders.map(|pid| fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count());
    let round = || {
        cluster.apply(pod);
        cluster.wait_ready();
        let _server = cluster.serve("app/passing", &["echo", "7000"]);
        let address = cluster.address("app/passing", Family::V4).to_string();
        let said = cluster.tcp("app/client", &["ask", &address, "7000", "hello"]).run().ok();
        assert!(said.starts_with("said hello"), "{said}");
        let held = descriptors();
        cluster.delete(pod);
        eventually("the pod to be gone", PATIENCE, || cluster.find_pod("app/passing").is_none());
        held
    };
    let before = descriptors();
    let during = round();
    assert!(during[0] > before[0] && during[1] > before[1], "a pod has sockets: {before:?}, then {during:?}");
    for _ in 0..3 {
        round();
    }
    wait_until("all sockets of the pod to be closed", PATIENCE, || {
        let now = descriptors();
        // A few of the processes' own come and go.
        if now.iter().zip(before).all(|(now, before)| *now <= before + 4) {
            Ok(())
        } else {
            Err(format!("{before:?}, now {now:?}"))
        }
    });
}
