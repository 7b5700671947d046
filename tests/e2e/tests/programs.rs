//! Unmodified programs in pods of two nodes, over IPv4 and IPv6: all of them work, and none knows.

#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::time::Duration;

use e2e::{Cluster, Family, Program, Running, Shared, needs, script};
use nix::sys::resource::{Resource, getrlimit};

static BOX: Shared = Shared::new(include_str!("../manifests/mesh.yaml"));

const LONG: Duration = Duration::from_secs(120);

/// nginx in a pod, with a page that says `body`.
fn nginx(cluster: &Cluster, pod: &str, port: u16, body: &str) -> Running {
    let folder = cluster.data(&format!("nginx-{port}"));
    let shown = folder.display();
    std::fs::write(folder.join("page.txt"), body).unwrap();
    let configuration = format!(
        "daemon off; pid {shown}/pid; error_log {shown}/error.log; events {{}}\n\
         http {{ access_log off; client_body_temp_path {shown}/body; server {{ listen {port}; listen [::]:{port}; root {shown}; }} }}\n"
    );
    let file = folder.join("nginx.conf");
    std::fs::write(&file, configuration).unwrap();
    let server = cluster.exec(pod, &["nginx", "-c", file.to_str().unwrap()]).spawn();
    cluster.wait_listening(pod, port);
    server
}

#[test]
fn curl_fetches_from_nginx_over_both_families() {
    needs!("root", "curl", "nginx");
    let cluster = BOX.get();
    let _nginx = nginx(&cluster, "app/server", 8080, "a page of nginx");
    for family in Family::BOTH {
        for client in ["app/client", "app/near"] {
            let url = format!("http://{}/page.txt", cluster.socket("app/server", family, 8080));
            let page = cluster.exec(client, &["curl", "--silent", "--show-error", "--fail", &url]).run().ok();
            assert_eq!(page, "a page of nginx", "{client} {url}");
        }
    }
}

#[test]
fn iperf3_runs_in_both_directions() {
    needs!("root", "iperf3");
    let cluster = BOX.get();
    let _server = cluster.exec("app/server", &["iperf3", "--server", "--port", "5201"]).spawn();
    cluster.wait_listening("app/server", 5201);
    for family in Family::BOTH {
        let address = cluster.address("app/server", family).to_string();
        let command = ["iperf3", "--client", &address, "--port", "5201", "--time", "1", "--parallel", "2", "--json"];
        for direction in [None, Some("--reverse")] {
            let report = cluster.exec("app/client", &command).args(direction).run().ok();
            let report: serde_json::Value = serde_json::from_str(&report).unwrap();
            let received = report["end"]["sum_received"]["bytes"].as_f64().unwrap_or_default();
            assert!(received > 1e6, "{family:?} {direction:?}: {received} bytes arrived");
        }
    }
}

#[test]
fn redis_keeps_what_it_is_given() {
    needs!("root", "redis-server", "redis-cli");
    let cluster = BOX.get();
    let folder = cluster.data("redis");
    let options = ["--port", "6379", "--bind", "*", "-::*", "--protected-mode", "no", "--save", "", "--dir"];
    let _server = cluster.exec("app/server", &["redis-server"]).args(options).args([&folder]).spawn();
    cluster.wait_listening("app/server", 6379);
    for family in Family::BOTH {
        let address = cluster.address("app/server", family).to_string();
        let client =
            |arguments: &[&str]| cluster.exec("app/client", &["redis-cli", "-h", &address]).args(arguments).run().ok();
        let (key, value) = (format!("key-{family:?}"), "v".repeat(100_000));
        assert_eq!(client(&["set", &key, &value]).trim(), "OK");
        assert_eq!(client(&["get", &key]).trim(), value);
        let pings = "PING\r\n".repeat(1000);
        let answers = cluster.exec("app/client", &["redis-cli", "-h", &address, "--pipe"]).input(pings).run().ok();
        assert!(answers.contains("errors: 0, replies: 1000"), "{answers}");
    }
}

#[test]
fn postgresql_answers_queries() {
    needs!("root", "postgres", "psql");
    let cluster = BOX.get();
    let programs = e2e::postgres().unwrap();
    let data = cluster.data("postgres").join("data");
    let data = data.to_str().unwrap();
    // The server refuses to be root, and looks its user up: nobody is everywhere.
    let as_nobody = |command: &[&str]| cluster.exec_with(&["--user", "65534"], "app/server", command).within(LONG);
    let initdb = programs.join("initdb");
    as_nobody(&[initdb.to_str().unwrap(), "-D", data, "--auth=trust", "--username=postgres", "--no-sync"]).run().ok();
    std::fs::write(format!("{data}/pg_hba.conf"), "host all all all trust\n").unwrap();
    let postgres = programs.join("postgres");
    let options = ["-D", data, "-h", "*", "-k", data, "-c", "fsync=off", "-c", "log_min_messages=error"];
    let _server = as_nobody(&[postgres.to_str().unwrap()]).args(options).spawn();
    cluster.wait_listening("app/server", 5432);
    for family in Family::BOTH {
        let host = cluster.address("app/server", family).to_string();
        let query = |sql: &str| {
            let psql = ["psql", "-h", &host, "-U", "postgres", "-At", "-v", "ON_ERROR_STOP=1", "-c", sql];
            cluster.exec("app/client", &psql).run().ok().trim().to_owned()
        };
        query(&format!("create table t_{family:?} as select n, md5(n::text) from generate_series(1, 50000) as n"));
        assert_eq!(query(&format!("select count(*), sum(n) from t_{family:?}")), "50000|1250025000");
        assert_eq!(query(&format!("select * from t_{family:?} order by n")).lines().count(), 50000);
        assert_eq!(query("select inet_client_addr()"), cluster.address("app/client", family).to_string());
    }
}

#[test]
fn a_server_that_speaks_first_is_heard_by_nc() {
    needs!("root", "nc");
    let cluster = BOX.get();
    let _server = cluster.serve("app/server", &["greet", "2525"]);
    for family in Family::BOTH {
        let server = cluster.address("app/server", family).to_string();
        let mut client = cluster.exec("app/client", &["nc", &server, "2525"]).spawn();
        client.wait_for(&format!("you are {} ", cluster.address("app/client", family)));
    }
}

#[test]
fn nc_gets_its_answer_after_it_closed_its_half() {
    needs!("root", "nc");
    let cluster = BOX.get();
    for (family, port) in Family::BOTH.into_iter().zip(["7100", "7101"]) {
        let mut server = cluster.serve("app/server", &["answer-after-end", port]);
        let address = cluster.address("app/server", family).to_string();
        let mut client = cluster.exec("app/client", &["nc", "-N", &address, port]).spawn();
        client.write("a question\n");
        client.close_input();
        server.wait_for("end 11");
        assert_eq!(client.stdout(), "");
        server.write("an answer\n");
        assert_eq!(client.finish(Duration::from_secs(10)).ok(), "an answer\n");
    }
}

#[test]
fn nc_goes_on_sending_after_its_server_closed_its_half() {
    needs!("root", "nc");
    let cluster = BOX.get();
    for (family, port) in Family::BOTH.into_iter().zip(["7110", "7111"]) {
        let listen = if family == Family::V4 { "-4" } else { "-6" };
        let mut server = cluster.exec("app/server", &["nc", listen, "-l", "-v", "-N", port]).spawn();
        server.wait_for("Listening");
        let address = cluster.address("app/server", family).to_string();
        let mut client = cluster.exec("app/client", &["nc", "-N", &address, port]).spawn();
        server.wait_for("Connection received");
        server.write("all that I have to say\n");
        server.close_input();
        client.wait_for("all that I have to say");
        for words in ["and now", "to something", "quite different"] {
            client.write(format!("{words}\n"));
            server.wait_for(words);
        }
        client.finish(Duration::from_secs(10)).ok();
        server.finish(Duration::from_secs(10)).ok();
    }
}

#[test]
fn grpc_calls_and_streams() {
    needs!("root", "grpc");
    let cluster = BOX.get();
    let script = script("grpc_echo.py");
    let mut server = cluster.exec("app/server", &["/usr/bin/python3", &script, "serve", "50051"]).spawn();
    server.wait_for("ready");
    for family in Family::BOTH {
        let target = cluster.socket("app/server", family, 50051).to_string();
        let said = cluster.exec("app/client", &["/usr/bin/python3", &script, "call", &target]).within(LONG).run().ok();
        assert_eq!(said.trim(), "good 100 stream [1000000, 1, 1000000]");
    }
}

#[test]
fn two_gigabytes_arrive_as_they_were() {
    needs!("root", "curl", "nginx", "openssl");
    let cluster = BOX.get();
    let _nginx = nginx(&cluster, "app/server", 8081, "small");
    let file = cluster.folder().join("nginx-8081/large");
    // A cipher over zeros is data that nothing compresses or guesses, and faster than the kernel's own.
    let make = format!(
        "openssl enc -aes-128-ctr -K {:032x} -iv 0 -in /dev/zero 2>/dev/null | head -c 2G | tee {} | sha256sum",
        std::process::id(),
        file.display()
    );
    let sent = Program::new("sh").args(["-c", &make]).within(LONG).run().ok();
    assert_eq!(std::fs::metadata(&file).unwrap().len(), 2 << 30);
    for family in Family::BOTH {
        let fetch = format!("curl -sSf http://{}/large | sha256sum", cluster.socket("app/server", family, 8081));
        let received = cluster.exec("app/client", &["sh", "-c", &fetch]).within(LONG).run();
        println!("{family:?}: 2 GiB in {:.1?}", received.took);
        assert_eq!(received.ok(), sent);
    }
}

#[test]
fn thousands_of_short_connections_all_succeed() {
    needs!("root");
    let cluster = BOX.get();
    let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    let count = (limit / 3).min(10_000).to_string();
    let _server = cluster.serve("app/server", &["echo", "7300"]);
    for family in Family::BOTH {
        let server: SocketAddr = cluster.socket("app/server", family, 7300);
        let arguments = ["flood", &server.ip().to_string(), "7300", &count, "64"];
        let said = cluster.tcp("app/client", &arguments).within(LONG).run().ok();
        println!("{family:?}: {}", said.trim());
        assert!(said.starts_with(&format!("good {count} of {count} ")), "{said}");
    }
}

#[test]
fn many_programs_run_in_one_pod_at_once() {
    needs!("root");
    let cluster = BOX.get();
    let _server = cluster.serve("app/server", &["echo", "7400"]);
    let server = cluster.address("app/server", Family::V4).to_string();
    let mut all: Vec<_> = (0..20).map(|_| cluster.tcp("app/client", &["hold", &server, "7400"]).spawn()).collect();
    all.iter_mut().for_each(|client| client.wait_for("open"));
    for (number, client) in all.iter_mut().enumerate() {
        client.write(format!("line {number}\n"));
    }
    for (number, client) in all.iter_mut().enumerate() {
        client.wait_for(&format!("back line {number}"));
    }
}
