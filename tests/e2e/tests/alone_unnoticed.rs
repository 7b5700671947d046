//! A killed agent keeps nobody waiting, also where connections come faster than sockets are kept ready.

#![forbid(unsafe_code)]

use std::time::Duration;

use e2e::{Cluster, ENOUGH, Family, PORT, Server, meanwhile, needs};

const MESH: &str = include_str!("../manifests/mesh.yaml");
/// It is started again, hears from the proxy what it is to serve, and makes sockets within this time; a socket that was asked
/// for and never came used to be waited for a second.
const UNNOTICED: Duration = Duration::from_millis(900);

#[test]
fn a_killed_agent_keeps_nobody_waiting() {
    needs!("root");
    let cluster = Cluster::start(MESH);
    let server = Server::start(&cluster, "app/server", PORT);
    for round in 0..3 {
        for node in ["node-a", "node-b"] {
            let load = server.load("app/client", Family::V4).short(8).start();
            load.wait_for_more(5 * ENOUGH);
            let report = meanwhile(load, |load| {
                cluster.kill(&format!("agent@{node}"));
                load.wait_for_more(5 * ENOUGH);
            });
            println!("{round}, the agent of {node}: {report}");
            report.assert_nothing_failed();
            let gap = report.of_phase("during", "short").gap;
            assert!(gap < UNNOTICED, "nobody was served for {gap:?}: {report}");
        }
    }
}
