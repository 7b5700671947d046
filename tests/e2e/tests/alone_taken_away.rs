//! What a captured pod's privileged program takes away from its capture while the pod is busy: seen, undone,
//! counted and told, with no payload in clear, and nothing that users notice.

#![forbid(unsafe_code)]

use std::time::Duration;

use e2e::{Cluster, ENOUGH, Family, Loaded, PATIENCE, PORT, Server, Wiretap, eventually, needs, script, under_load};

const MESH: &str = include_str!("../manifests/mesh.yaml");

/// A second is promised, and held where nothing competes for the processors (`repair.rs` of the agent's tests). Here the load
/// has them, and each look is a dozen programs.
const WITHIN: Duration = Duration::from_secs(5);

/// What is done in the pod, and what the agent's event says of it.
struct Damage {
    command: &'static str,
    told: &'static str,
}

/// Of rules, routes and the guards, one at a time.
const DAMAGES: [Damage; 8] = [
    Damage { command: "nft flush ruleset", told: "the table justmtls is gone" },
    Damage { command: "nft flush chain inet justmtls capture_in", told: "the chain capture_in has 0 rules" },
    Damage {
        command: "nft delete rule inet justmtls capture_out handle \
                  $(nft -a list chain inet justmtls capture_out | sed -n '/redirect to/{s/.*# handle //;p;q}')",
        told: "the chain capture_out has",
    },
    Damage { command: "ip rule del pref 1000", told: "the rule ip -4 rule pref 1000" },
    Damage { command: "ip -6 rule del pref 1000", told: "the rule ip -6 rule pref 1000" },
    Damage { command: "ip route flush table 27245", told: "the route ip -4 route" },
    Damage { command: "tc qdisc del dev eth0 clsact", told: "is missing" },
    Damage { command: "tc qdisc del dev lo clsact", told: "is missing" },
];

/// A pod and its agent.
struct Victim<'a> {
    cluster: &'a Cluster,
    pod: &'static str,
    agent: &'static str,
}

impl Victim<'_> {
    const BOTH: [(&'static str, &'static str); 2] = [("app/client", "agent@node-a"), ("app/server", "agent@node-b")];

    fn repairs(&self) -> i64 {
        self.cluster.metric(self.agent, "justmtls_agent_repairs_total")
    }

    /// How often the agent has told of a repair in these words.
    fn told(&self, words: &str) -> usize {
        let uid = e2e::text(&self.cluster.pod(self.pod), "uid").to_owned();
        let events = self.cluster.admin(self.agent, "/events");
        let all = events.as_array().expect("events are a list").iter();
        all.filter(|it| {
            it["event"] == "repaired" && it["pod"] == uid.as_str() && e2e::text(it, "detail").contains(words)
        })
        .count()
    }

    /// Does it, and waits until it is undone, counted and told.
    fn suffer(&self, damage: &Damage) {
        let took = self.suffer_once(damage);
        println!("{}: {}: undone in {took:?}", self.pod, damage.command);
        assert!(took < WITHIN, "{}: {took:?}", damage.command);
    }

    fn suffer_once(&self, damage: &Damage) -> Duration {
        let (repairs, told) = (self.repairs(), self.told(damage.told));
        let undo = ["/usr/bin/python3", &script("undo.py"), damage.command];
        let took = self.cluster.exec_with(&["--privileged"], self.pod, &undo).run().ok();
        eventually("it to be counted", PATIENCE, || self.repairs() > repairs);
        eventually("an event to say it", PATIENCE, || self.told(damage.told) > told);
        Duration::from_millis(took.trim().parse().expect("milliseconds"))
    }
}

#[test]
fn rules_routes_and_guards_that_are_taken_away_one_at_a_time_are_back_and_no_user_notices() {
    needs!("root", "nft", "tc", "ip", "ss", "dumpcap", "tshark");
    for (pod, agent) in Victim::BOTH {
        let cluster = Cluster::start(MESH);
        let victim = Victim { cluster: &cluster, pod, agent };
        let suffer = |load: &Loaded| {
            for damage in &DAMAGES {
                victim.suffer(damage);
                load.wait_for_more(ENOUGH);
            }
        };
        under_load(&cluster, &pod.replace("app/", "taken-from-"), true, suffer).assert_nothing_failed();
    }
}

#[test]
fn listeners_that_are_closed_listen_again_and_open_connections_go_on() {
    needs!("root", "nft", "tc", "ip", "ss", "dumpcap", "tshark");
    let listeners = [
        Damage { command: "ss --kill --tcp --listening 'sport = :15001'", told: ":15001 is closed" },
        Damage { command: "ss --kill --tcp --listening 'sport = :15006'", told: ":15006 is closed" },
    ];
    for ((pod, agent), damage) in Victim::BOTH.into_iter().zip(listeners) {
        let cluster = Cluster::start(MESH);
        let victim = Victim { cluster: &cluster, pod, agent };
        let report = under_load(&cluster, &pod.replace("app/", "closed-at-"), false, |load| {
            for _ in 0..3 {
                victim.suffer(&damage);
                load.wait_for_more(ENOUGH);
            }
        });
        // Until it listens again nobody does: a reset, and never a clean end or silence.
        for kind in ["early-end", "wrong-bytes", "timeout", "other"] {
            report.assert_never(kind);
        }
        let (opened, lost, closed) = report.long();
        assert!(lost == 0 && opened == closed, "{report}");
        assert_eq!(report.of_phase("after", "short").failed, 0, "{report}");
    }
}

#[test]
fn both_guards_at_once_are_back_and_nothing_in_clear_is_served_by_strict() {
    needs!("root", "nft", "tc", "ip", "ss", "dumpcap", "tshark");
    let both = Damage {
        command: "nft flush ruleset; ip rule del pref 1000; tc qdisc del dev eth0 clsact; tc qdisc del dev lo clsact",
        told: "is",
    };
    let cluster = Cluster::start(MESH);
    cluster.apply(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: app}\n\
         spec: {mtls: {mode: STRICT}}\n",
    );
    let server = Server::start(&cluster, "app/server", PORT);
    let url = format!("http://{}/", server.address(Family::V4));
    eventually("strict to be enforced", PATIENCE, || {
        !cluster.exec("legacy/outsider", &["curl", "-sS", "--max-time", "5", &url]).run().success()
    });
    let mut load = server.load("app/client", Family::V4).short(8).long(10, Duration::from_millis(50)).start();
    load.wait_for_more(ENOUGH);
    load.event();
    for (pod, agent) in Victim::BOTH {
        Victim { cluster: &cluster, pod, agent }.suffer(&both);
    }
    load.over();
    // What is open from now on is of captured pods again, to the last byte.
    let mut tap = Wiretap::start(&cluster, "node-a", "both-guards");
    load.wait_for_more(2 * ENOUGH);
    let report = load.finish();
    tap.stop();
    println!("{report}");
    report.assert_spans_the_event();
    for kind in ["early-end", "wrong-bytes", "other"] {
        report.assert_never(kind);
    }
    assert_eq!(report.of_phase("after", "short").failed, 0, "{report}");
    tap.streams(PORT).assert_all_tls();
    // Permissive would have listed what came in clear, by its name (`what_slips_by_both_guards_is_named_a_bypass`).
    let served_in_clear =
        cluster.edges("node-b").into_iter().find(|edge| edge[0] == "inbound" && edge[4] == "plaintext");
    assert_eq!(served_in_clear, None);
}
