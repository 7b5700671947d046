//! Congestion control: the same for all hops of all contenders, whatever the machine's own choice is.
//!
//! A machine that stands at a wire may well have another one, which halves what passes between two pods of it. It is set
//! by the pod's route, as only the machine's own namespace may make an algorithm the default that is not allowed to all.

use anyhow::{Result, ensure};

use crate::cluster::Cluster;

/// Linux' own default.
pub(crate) const NAME: &str = "cubic";

/// Sets it for connections of a pod to elsewhere.
pub(crate) fn set(cluster: &Cluster, pod: &str) -> Result<()> {
    let route = cluster.output(pod, &["ip", "-4", "route", "show", "default"])?;
    let mut command = vec!["ip", "-4", "route", "change"];
    command.extend(route.split_whitespace());
    command.extend(["congctl", NAME]);
    cluster.output(pod, &command).map(drop)
}

/// Checks it, on all connections that the pod has right now.
pub(crate) fn check(cluster: &Cluster, pod: &str) -> Result<()> {
    let sockets =
        cluster.output(pod, &["ss", "--tcp", "--numeric", "--info", "--no-header", "state", "established"])?;
    let (seen, wrong) = look(&sockets);
    ensure!(seen > 0, "{pod} has no connection to look at");
    ensure!(wrong.is_empty(), "connections of {pod} do not have {NAME}: {wrong:?}");
    Ok(())
}

/// How many sockets `ss` shows, and what it says of those that have something else. Their second lines are indented and
/// begin with the algorithm, or with the word `ts sack ecn`, which are options.
fn look(sockets: &str) -> (usize, Vec<&str>) {
    let lines: Vec<&str> = sockets.lines().filter(|line| line.starts_with(char::is_whitespace)).collect();
    let has_it = |line: &&str| line.split_whitespace().any(|word| word == NAME);
    (lines.len(), lines.iter().copied().filter(|line| !has_it(line)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_with_another_algorithm_is_seen() {
        let text = "0 0 10.0.0.1:5 10.0.0.2:7000\n\t ts sack cubic wscale:7,7 rto:204\n\
                    0 0 10.0.0.1:6 10.0.0.2:7000\n\t ts sack bbr wscale:7,7 rto:204\n";
        let (seen, wrong) = look(text);
        assert_eq!((seen, wrong.len()), (2, 1));
        assert!(wrong[0].contains("bbr"));
        assert_eq!(look(""), (0, Vec::new()));
    }
}
