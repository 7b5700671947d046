//! What the kubelet asks of a pod, as its containers declare it.

use manifests::k8s_openapi::api::core::v1 as core;
use manifests::k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use mesh::{Check, HttpProbe, MOST_PROBE_TEXT, MOST_PROBES, Probe, Probes};

use crate::problem::{Problem, quoted};

/// The probes and hooks of a pod's containers, and of those init containers that go on running.
pub(super) fn read(spec: &core::PodSpec, object: &str, problems: &mut Vec<Problem>) -> Probes {
    let sidecars = spec.init_containers.iter().flatten();
    let sidecars = sidecars.filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let all = spec.containers.iter().chain(sidecars).flat_map(of_container);
    let mut read = Vec::new();
    for probe in all {
        match probe {
            Ok(probe) => read.push(probe),
            Err(Unreadable { container, what, why }) => problems.push(Problem::warning(
                object,
                format!(
                    "container {}: its {what} {why}; it is refused where plaintext is, until that is corrected",
                    quoted(&container)
                ),
            )),
        }
    }
    Probes::new(read).unwrap_or_else(|| {
        let message = format!(
            "has more than {MOST_PROBES} different probes, or more than {MOST_PROBE_TEXT} bytes of paths and headers in \
             them; all are refused where plaintext is: declare fewer"
        );
        problems.push(Problem::error(object, message));
        Probes::default()
    })
}

/// A probe that cannot be let through.
struct Unreadable {
    container: String,
    what: &'static str,
    why: String,
}

fn of_container(container: &core::Container) -> Vec<Result<Probe, Unreadable>> {
    let probes = [
        ("livenessProbe", &container.liveness_probe),
        ("readinessProbe", &container.readiness_probe),
        ("startupProbe", &container.startup_probe),
    ];
    let of_probe = |(what, probe): (&'static str, &core::Probe)| {
        let http = probe.http_get.as_ref().map(|http| of_http(container, http));
        let tcp = probe.tcp_socket.as_ref().map(|tcp| of_tcp(container, tcp));
        let grpc = probe.grpc.as_ref().map(|grpc| number(grpc.port).map(|port| Probe { port, check: Check::Grpc }));
        [http, tcp, grpc].into_iter().flatten().map(move |read| (what, read))
    };
    let probes = probes.into_iter().filter_map(|(what, probe)| Some((what, probe.as_ref()?))).flat_map(of_probe);
    let hooks = container
        .lifecycle
        .as_ref()
        .map(|hooks| [("postStart hook", hooks.post_start.as_ref()), ("preStop hook", hooks.pre_stop.as_ref())]);
    let of_hook = |(what, hook): (&'static str, &core::LifecycleHandler)| {
        let http = hook.http_get.as_ref().map(|http| of_http(container, http));
        let tcp = hook.tcp_socket.as_ref().map(|tcp| of_tcp(container, tcp));
        [http, tcp].into_iter().flatten().map(move |read| (what, read))
    };
    let hooks = hooks.into_iter().flatten().filter_map(|(what, hook)| Some((what, hook?))).flat_map(of_hook);
    let name = |(what, read): (&'static str, Result<Probe, String>)| {
        read.map_err(|why| Unreadable { container: container.name.clone(), what, why })
    };
    probes.chain(hooks).map(name).collect()
}

fn of_http(container: &core::Container, http: &core::HTTPGetAction) -> Result<Probe, String> {
    let port = port(container, &http.port)?;
    if http.scheme.as_deref() == Some("HTTPS") {
        return Ok(Probe { port, check: Check::Https });
    }
    let headers = http.http_headers.iter().flatten();
    let headers = headers.map(|header| (header.name.as_str(), header.value.as_str()));
    let request = HttpProbe::new(http.path.as_deref().unwrap_or_default(), http.host.as_deref(), headers);
    let request = request.ok_or("has a path, a host or a header that no request can carry")?;
    Ok(Probe { port, check: Check::Http(request) })
}

fn of_tcp(container: &core::Container, tcp: &core::TCPSocketAction) -> Result<Probe, String> {
    Ok(Probe { port: port(container, &tcp.port)?, check: Check::Tcp })
}

/// A port's name is one of its own container, as the kubelet has it.
fn port(container: &core::Container, port: &IntOrString) -> Result<u16, String> {
    match port {
        IntOrString::Int(port) => number(*port),
        IntOrString::String(name) => {
            let named = container.ports.iter().flatten().find(|port| port.name.as_ref() == Some(name));
            let none = || format!("names the port {}, which the container does not have", quoted(name));
            number(named.ok_or_else(none)?.container_port)
        }
    }
}

fn number(port: i32) -> Result<u16, String> {
    let read = u16::try_from(port).ok().filter(|port| *port != 0);
    read.ok_or_else(|| format!("has the port {port}; a port is 1 to 65535"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(containers: &str) -> core::PodSpec {
        let text =
            format!("apiVersion: v1\nkind: Pod\nmetadata: {{ name: web, namespace: shop }}\nspec:\n{containers}");
        let parsed = manifests::parse("pod.yaml", text.as_bytes());
        assert!(parsed.problems.is_empty(), "{:?}", parsed.problems);
        match parsed.objects.into_iter().next() {
            Some((manifests::Object::Pod(pod), _)) => pod.spec.expect("a spec"),
            other => panic!("{other:?}"),
        }
    }

    fn read_all(containers: &str) -> (Vec<Probe>, Vec<Problem>) {
        let mut problems = Vec::new();
        let probes = read(&spec(containers), "Pod shop/web", &mut problems);
        (probes.iter().cloned().collect(), problems)
    }

    fn http(port: u16, path: &str, headers: &[(&str, &str)]) -> Probe {
        Probe { port, check: Check::Http(HttpProbe::new(path, None, headers.iter().copied()).expect("a request")) }
    }

    #[test]
    fn every_kind_of_probe_and_hook_of_containers_and_sidecars_is_read() {
        let (probes, problems) = read_all(
            r#"
  containers:
    - name: web
      image: web
      ports: [{ name: http, containerPort: 8080 }]
      livenessProbe: { httpGet: { path: /live?full=1, port: http, httpHeaders: [{ name: X-Probe, value: "yes" }] } }
      readinessProbe: { httpGet: { path: /ready, port: 8443, scheme: HTTPS } }
      startupProbe: { tcpSocket: { port: 9000 } }
      lifecycle: { preStop: { httpGet: { path: drain, port: 8080 } }, postStart: { httpGet: { path: /live, port: 1 } } }
    - name: rpc
      image: rpc
      ports: [{ name: http, containerPort: 8081 }]
      livenessProbe: { httpGet: { path: /, port: http } }
      readinessProbe: { grpc: { port: 7000, service: shop } }
      startupProbe: { exec: { command: ["true"] } }
  initContainers:
    - { name: side, image: side, restartPolicy: Always, livenessProbe: { tcpSocket: { port: 7001 } } }
    - { name: once, image: once }
"#,
        );
        assert!(problems.is_empty(), "{problems:?}");
        let mut expected = vec![
            http(8080, "/live?full=1", &[("X-Probe", "yes")]),
            Probe { port: 8443, check: Check::Https },
            Probe { port: 9000, check: Check::Tcp },
            http(8080, "/drain", &[]),
            http(1, "/live", &[]),
            // By the name of a port, which is another one in each container.
            http(8081, "/", &[]),
            Probe { port: 7000, check: Check::Grpc },
            Probe { port: 7001, check: Check::Tcp },
        ];
        expected.sort();
        assert_eq!(probes, expected);
    }

    #[test]
    fn what_cannot_be_let_through_is_named_and_takes_nothing_along() {
        let (probes, problems) = read_all(
            r#"
  containers:
    - name: web
      image: web
      livenessProbe: { httpGet: { path: /live, port: nowhere } }
      readinessProbe: { tcpSocket: { port: 80 } }
"#,
        );
        assert_eq!(probes, [Probe { port: 80, check: Check::Tcp }]);
        let [problem] = &problems[..] else { panic!("{problems:?}") };
        let text = problem.to_string();
        assert!(text.contains("livenessProbe names the port nowhere,"), "{text}");
    }

    #[test]
    fn more_than_a_pod_may_have_are_none_and_said() {
        let container = |port: u32| {
            format!("    - {{ name: c{port}, image: x, livenessProbe: {{ tcpSocket: {{ port: {port} }} }} }}\n")
        };
        let containers = |count: u32| (1..=count).map(container).collect::<String>();
        let (probes, problems) = read_all(&format!("  containers:\n{}", containers(64)));
        assert_eq!((probes.len(), problems.len()), (64, 0));
        let (probes, problems) = read_all(&format!("  containers:\n{}", containers(65)));
        assert_eq!((probes.len(), problems.len()), (0, 1));
    }
}
