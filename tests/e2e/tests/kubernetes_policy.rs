//! On a real Kubernetes: what a NetworkPolicy's engine allows and denies by port stays so, also for what rides on a warm tunnel; policies
//! that mean something else under Istio say so, and one bad element of one closes no pods but its own; and whoever asks for what is not
//! his, at the control plane or at the agent's socket, is refused, counted and named.

#![forbid(unsafe_code)]

use std::time::{Duration, Instant};

use e2e::{Finished, Kubernetes, PATIENCE, SHOP, eventually, needs, part_needs, wait_until};

const GATE: &str = include_str!("../manifests/kubernetes_policy.yaml");
const INTRUDER: &str = include_str!("../manifests/kubernetes_intruder.yaml");
const SOON: Duration = Duration::from_secs(120);
/// How long an ask waits for its answer: longer than a refusal takes, and not as long as a lost SYN is tried.
const ANSWER: Duration = Duration::from_secs(3);
/// A tunnel at rest goes within a second of a change (T20); a machine that is busy has a little longer.
const CUT_WITHIN: Duration = Duration::from_secs(5);
const OURS: &str = "justmtls-system";

/// What an engine of NetworkPolicies has on a node: what is open goes on, and what is new is looked up by its port.
const ENGINE: &str = "
table inet some-engine {
    chain denied { }
    chain forward {
        type filter hook forward priority 0; policy accept;
        ct state established,related accept
        jump denied
    }
}
";

/// For the server's pod: the first port alone.
const FRONT_ONLY: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: { name: front-only, namespace: shop }
spec:
  podSelector: { matchLabels: { app: gate } }
  policyTypes: [Ingress]
  ingress: [{ ports: [{ port: 8080, protocol: TCP }] }]
";

#[test]
fn ports_that_are_denied_stay_denied_and_wrong_people_are_refused() {
    needs!("cluster", "curl");
    let cluster = Kubernetes::up("pol");
    cluster.install(&[]);
    cluster.apply(SHOP);
    for namespace in ["shop", "outside"] {
        cluster.wait_ready(namespace);
    }
    for pod in ["shop/client", "shop/web"] {
        cluster.wait_captured(pod);
    }
    policies_that_are_not_as_written(&cluster);
    policies_of_istio(&cluster);
    port_policies(&cluster);
    somebody_elses_identity(&cluster);
    the_control_planes_port(&cluster);
    the_agents_socket(&cluster);
}

/// What only audits keeps nobody out, and of a policy with an address that is none the pods beside it know nothing; the status of each
/// says so.
fn policies_that_are_not_as_written(cluster: &Kubernetes) {
    let web_answers = || cluster.ask("shop/client", "web.shop:80", ANSWER).success();
    println!("an audit");
    assert!(web_answers());
    cluster.apply(AUDIT);
    wait_for_status(cluster, "shop", "authorizationpolicy/audit", "True", "nothing is audited");
    assert!(web_answers());
    cluster.delete(AUDIT);

    println!("an address that is none");
    let bad = |app: &str| BAD_VALUE.replace("APP", app);
    cluster.apply(&bad("redis"));
    wait_for_status(cluster, "shop", "authorizationpolicy/bad", "False", "10.0.0.0/33");
    assert!(web_answers());
    cluster.delete(&bad("redis"));
    cluster.apply(&bad("web"));
    eventually("it to refuse for whom it selects", SOON, || !web_answers());
    cluster.delete(&bad("web"));
    eventually("it to be forgotten", SOON, web_answers);
}

/// Strict for the mesh under Istio is for one namespace here; and our own definition takes no address that is none.
fn policies_of_istio(cluster: &Kubernetes) {
    // On somebody's cluster Istio may be at home: its root namespace and its definition are no test's.
    part_needs!("nodes");
    println!("strict in istio-system");
    cluster.apply(ISTIO_STRICT);
    wait_for_status(cluster, "istio-system", "peerauthentication/default", "True", "put it into justmtls-system");
    cluster.ask("outside/stranger", "web.shop:80", ANSWER).ok();
    cluster.delete(ISTIO_STRICT);
    let refused = cluster.kubectl(&["apply", "-f", "-"]).input(BAD_BLOCK.to_owned()).run().fails();
    assert!(refused.contains("ipBlocks"), "{refused}");
    let of_port = |port: u32| {
        cluster
            .kubectl(&["apply", "--dry-run=server", "-f", "-"])
            .input(PORT_MODE.replace("PORT", &port.to_string()))
            .run()
    };
    let refused = of_port(65536).fails();
    assert!(refused.contains("a port is a number from 1 to 65535"), "{refused}");
    of_port(65535).ok();
}

#[track_caller]
fn wait_for_status(cluster: &Kubernetes, namespace: &str, policy: &str, enforced: &str, words: &str) {
    cluster.wait_for(&format!("the status of {policy} to say {words:?}"), &["-n", namespace, policy], |policy| {
        let mut conditions = policy["status"]["conditions"].as_array().into_iter().flatten();
        conditions.any(|it| {
            let said = it["message"].as_str().unwrap_or_default();
            it["type"] == "justmtls.dev/Enforced" && it["status"] == enforced && said.contains(words)
        })
    });
}

const ISTIO_STRICT: &str = "
apiVersion: v1
kind: Namespace
metadata: { name: istio-system }
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: default, namespace: istio-system }
spec: { mtls: { mode: STRICT } }
";

/// The source is nobody.
const AUDIT: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: audit, namespace: shop }
spec: { action: AUDIT, rules: [{ from: [{ source: { principals: [cluster.local/ns/no/sa/body] } }] }] }
";

const BAD_BLOCK: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: bad, namespace: shop }
spec: { action: DENY, rules: [{ from: [{ source: { ipBlocks: [10.0.0.0/33] } }] }] }
";

/// The mode of a port.
const PORT_MODE: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: { name: port, namespace: shop }
spec: { selector: { matchLabels: { app: web } }, portLevelMtls: { PORT: { mode: STRICT } } }
";

/// Values of conditions are free text to every definition.
const BAD_VALUE: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: { name: bad, namespace: shop }
spec:
  selector: { matchLabels: { app: APP } }
  action: DENY
  rules: [{ when: [{ key: source.ip, values: [10.0.0.0/33] }] }]
";

/// The rules on the node see the ports that the application chose; what they denied before is denied, and what they deny from now on
/// is so for the very next connection, although a tunnel to it was warm.
fn port_policies(cluster: &Kubernetes) {
    part_needs!("nodes", "nft");
    cluster.apply(GATE);
    cluster.wait_ready("shop");
    cluster.wait_captured("shop/gate");
    let [_, worker] = cluster.nodes();
    let address = cluster.addresses("shop/gate").into_iter().find(|address| address.is_ipv4()).expect("IPv4");
    let ask = |port: u16| cluster.ask("shop/client", &format!("{address}:{port}"), ANSWER);
    let nft = |commands: &str| cluster.on_node(&worker, &["nft", "-f", "-"]).input(commands.to_owned()).run().ok();
    let deny = |port: u16| {
        nft(&format!("add rule inet some-engine denied ip daddr {address} tcp dport {port} counter drop"));
    };
    let dropped = || {
        let rules =
            cluster.on_node(&worker, &["nft", "-j", "list", "chain", "inet", "some-engine", "denied"]).run().ok();
        let rules: serde_json::Value = serde_json::from_str(&rules).expect("nft prints JSON");
        let all = rules["nftables"].as_array().expect("a list").iter();
        let counted = all.flat_map(|it| it["rule"]["expr"].as_array().into_iter().flatten());
        counted.filter_map(|expression| expression["counter"]["packets"].as_u64()).sum::<u64>()
    };

    println!("a port that was never allowed");
    nft(ENGINE);
    deny(8081);
    ask(8080).ok();
    wait_until("mTLS to the gate", SOON, || cluster.edge("shop/client", "shop/gate", "mtls", None));
    let denied = ask(8081);
    assert!(!denied.success(), "{denied}");
    assert!(dropped() > 0, "it was the engine that saw the port");

    println!("a port that is denied while a tunnel to it is warm");
    nft("flush chain inet some-engine denied");
    ask(8081).ok();
    deny(8081);
    // To the engine the tunnel is one connection that was allowed. This is what makes the next step mean something.
    ask(8081).ok();
    assert_eq!(dropped(), 0, "it went through a tunnel that was there");
    cluster.apply(FRONT_ONLY);
    let began = Instant::now();
    let (denied, after) = loop {
        let (asked, at) = (ask(8081), began.elapsed());
        if !asked.success() {
            break (asked, at);
        }
        assert!(at < CUT_WITHIN, "it still passes {at:?} after the policy: {asked}");
    };
    println!("denied by an ask that was over {after:?} after the policy: {denied}");
    assert!(dropped() > 0, "a new connection was dialled, and the engine denied it");
    assert!(!ask(8081).success(), "and it stays so");
    ask(8080).ok();

    println!("and is allowed again");
    cluster.delete(FRONT_ONLY);
    nft("delete table inet some-engine");
    wait_until("the port to be open again", SOON, || {
        let asked = ask(8081);
        if asked.success() { Ok(()) } else { Err(format!("{asked}")) }
    });
}

/// A node's proxy may ask for the identities of its own pods, and for nobody else's; its agent for none.
fn somebody_elses_identity(cluster: &Kubernetes) {
    part_needs!("nodes");
    println!("somebody else's identity");
    let [first, worker] = cluster.nodes();
    let token = |pod: &str, audience: &str| {
        let bound = ["--bound-object-kind", "Pod", "--bound-object-name", pod, "--audience", audience];
        cluster.kubectl(&["-n", OURS, "create", "token", "justmtls-node"]).args(bound).run().ok().trim().to_owned()
    };
    let service = cluster.get(&["-n", OURS, "service", "justmtls-control"]);
    let control = service["spec"]["clusterIP"].as_str().expect("an address").to_owned();
    let bundle = cluster.get(&["-n", OURS, "configmap", "justmtls-trust-bundle"]);
    let bundle = bundle["data"]["bundle.pem"].as_str().expect("a bundle");
    let certify = |node: &str, token: &str, account: &str| -> Finished {
        let identity = format!("spiffe://cluster.local/ns/shop/sa/{account}");
        cluster.on_node(node, &[env!("CARGO_BIN_EXE_stranger"), &control, bundle, token, &identity]).run()
    };
    let [proxy, agent] = ["justmtls.dev/proxy", "justmtls.dev/agent"].map(|it| token(&cluster.node_pod(&first), it));
    // Its twin: the same token, the same node, the identity of a pod that runs there.
    certify(&first, &proxy, "client").ok();
    // `web` runs on the worker alone. Where the call comes from says nothing: the node is the token's.
    for (from, token, account, reason) in [
        (&first, &proxy, "web", "not-on-this-node"),
        (&worker, &proxy, "web", "not-on-this-node"),
        (&first, &proxy, "nobody", "not-on-this-node"),
        (&first, &agent, "client", "wrong-role"),
    ] {
        let before = cluster.control_counts("certificates", reason);
        let said = certify(from, token, account).fails();
        assert!(said.contains(reason), "{said}");
        assert_eq!(cluster.control_counts("certificates", reason), before + 1, "{account} by {reason}");
    }
    let log = cluster.control_log();
    for (reason, words) in [("not-on-this-node", "/ns/shop/sa/web"), ("wrong-role", "agent")] {
        let line = log.lines().find(|line| {
            line.contains("certificate refused") && [reason, words, &first].iter().all(|word| line.contains(word))
        });
        assert!(line.is_some(), "{reason} of {first} is in the log: {log}");
    }

    println!("a pod that is gone");
    let passing = PASSING.replace("NODE", &worker);
    cluster.apply(&passing);
    // An answer counts for a while, here and at the API server: each of the three is shown for the first time.
    let [early, late, reviewed] = [(); 3].map(|()| token("passing", "justmtls.dev/proxy"));
    // The twin: while the pod is there, so is its node's identity.
    certify(&first, &early, "web").ok();
    cluster.delete(&passing);
    let review = REVIEW.replace("TOKEN", &reviewed);
    wait_until("the API server to know that the pod is gone", SOON, || {
        let said = cluster.kubectl(&["create", "-o", "json", "-f", "-"]).input(review.clone()).run().ok();
        let said: serde_json::Value = serde_json::from_str(&said).expect("kubectl prints JSON");
        if said["status"]["authenticated"] == true { Err(format!("{}", said["status"])) } else { Ok(()) }
    });
    let logged = || cluster.control_logged(&["WARN", "a caller is refused", "\"not-vouched-for\""]);
    let (before, logged_before) = (cluster.control_counts("refused_calls", "not-vouched-for"), logged());
    let said = certify(&first, &late, "web").fails();
    assert!(said.contains("does not vouch for the token"), "{said}");
    assert_eq!(cluster.control_counts("refused_calls", "not-vouched-for"), before + 1);
    eventually("the refusal to be logged", PATIENCE, || logged() > logged_before);
}

/// Of the node's own account, and so one that its tokens can be bound to.
const PASSING: &str = "
apiVersion: v1
kind: Pod
metadata: { name: passing, namespace: justmtls-system }
spec:
  serviceAccountName: justmtls-node
  nodeName: NODE
  terminationGracePeriodSeconds: 1
  containers: [{ name: passing, image: IMAGE, args: [demo-app, serve, --port, '8080'] }]
";

const REVIEW: &str = "
apiVersion: authentication.k8s.io/v1
kind: TokenReview
spec: { token: TOKEN, audiences: [justmtls.dev/proxy] }
";

/// What speaks no TLS comes to no call, and is counted and logged.
fn the_control_planes_port(cluster: &Kubernetes) {
    println!("in clear to the control plane");
    let service = cluster.get(&["-n", OURS, "service", "justmtls-control"]);
    let control = format!("{}:15012", service["spec"]["clusterIP"].as_str().expect("an address"));
    let logged = || cluster.control_logged(&["INFO", "a connection ended before a token was accepted", "\"not-tls\""]);
    let logged_before = logged();
    for pod in ["outside/stranger", "shop/client"] {
        let before = cluster.control_counts("refused_connections", "not-tls");
        let asked = cluster.ask(pod, &control, ANSWER);
        assert!(!asked.success(), "{asked}");
        eventually(&format!("{pod} to be counted"), PATIENCE, || {
            cluster.control_counts("refused_connections", "not-tls") > before
        });
    }
    // The second of them may have come within the second in which a reason has one line.
    eventually("a connection in clear to be logged", PATIENCE, || logged() > logged_before);
}

/// The sockets of a node's processes know their peers by user, which no pod of another user is: root neither.
fn the_agents_socket(cluster: &Kubernetes) {
    part_needs!("nodes", "perl");
    cluster.apply(INTRUDER);
    cluster.wait_ready("outside");
    println!("at the agent's socket");
    let [_, worker] = cluster.nodes();
    let agent = cluster.node_pod(&worker);
    let strangers = || {
        let pod = cluster.get(&["-n", OURS, "pod", &agent]);
        let address = pod["status"]["podIP"].as_str().expect("an address");
        let url = format!("http://{address}:15021/metrics");
        let page = cluster.on_node(&worker, &["curl", "-sS", "--max-time", "5", &url]).run().ok();
        let line = page.lines().find_map(|line| line.strip_prefix("justmtls_agent_strangers_total "));
        line.and_then(|count| count.parse::<u64>().ok()).expect("a number")
    };
    // SOCK_SEQPACKET is 5. It says how many bytes it was told before the end, or why it could not even connect.
    let script = r#"
        ($socket, $user) = @ARGV; $> = $user; socket(S, 1, 5, 0) or die;
        connect(S, pack("Sa108", 1, $socket)) or die "cannot connect: $!";
        print "told ", sysread(S, $said, 1024) + 0, " bytes";
    "#;
    let speak = |socket: &str, user: &str| {
        let path = format!("/run/justmtls/{socket}");
        cluster.exec("outside/intruder", &["perl", "-e", script, &path, user]).run()
    };
    // One that may not even open the file.
    let before = strangers();
    for socket in ["proxy/agent.sock", "cni.sock"] {
        let said = speak(socket, "4711").fails();
        assert!(said.contains("Permission denied"), "{said}");
    }
    assert_eq!(strangers(), before, "nobody came so far");
    // The pod's root opens any file, and is not the proxy.
    assert_eq!(speak("proxy/agent.sock", "0").ok(), "told 0 bytes");
    assert_eq!(strangers(), before + 1);
    let log = cluster.kubectl(&["-n", OURS, "logs", &agent, "-c", "agent"]).run().ok();
    let words = ["refused a stranger", "agent.sock", "uid"];
    assert!(log.lines().any(|line| words.iter().all(|word| line.contains(word))), "{log}");
    // The proxy is there all the while.
    cluster.ask("shop/client", "web.shop:80", ANSWER).ok();
}
