//! What came out of a run of the control plane, for people and for programs.

use std::fmt::Write;

use serde::Serialize;

use crate::results::Machine;

/// With more of its processor used the simulator itself may be what is waited for.
const SIMULATOR_BUSY: f64 = 0.9;
/// With more of a processor used by other programs, they may be.
const OTHERS_BUSY: f64 = 0.1;

/// A delay, in milliseconds.
#[derive(Debug, Default, Serialize)]
pub(super) struct Delay {
    pub(super) count: usize,
    pub(super) p50: f64,
    pub(super) p99: f64,
    pub(super) most: f64,
}

impl Delay {
    pub(super) fn of(mut all: Vec<f64>) -> Delay {
        all.sort_by(f64::total_cmp);
        let at = |part: f64| all.get(((all.len() as f64 * part) as usize).min(all.len().saturating_sub(1))).copied();
        let at = |part| at(part).unwrap_or_default();
        Delay { count: all.len(), p50: at(0.5), p99: at(0.99), most: at(1.0) }
    }

    fn row(&self) -> String {
        if self.count == 0 {
            return "none seen".to_owned();
        }
        format!("{:.0} ms, {:.0} ms, {:.0} ms", self.p50, self.p99, self.most)
    }
}

/// All of one run. Memory is in bytes, times in seconds, processor time in seconds for each second.
#[derive(Debug, Default, Serialize)]
pub(super) struct Figures {
    pub(super) machine: Machine,
    pub(super) nodes: usize,
    pub(super) pods: usize,
    pub(super) services: usize,
    /// The mean length of a pod's object.
    pub(super) pod_bytes: usize,
    /// From its start until the control plane is ready.
    pub(super) ready_after: f64,
    pub(super) ready_processor: f64,
    /// Resident when it is ready, before the first node.
    pub(super) resident_ready: u64,
    /// From the first node's connection until every node has what it is to have and all pods count as captured.
    pub(super) connected_after: f64,
    pub(super) connected_processor: f64,
    pub(super) resident_connected: u64,
    /// With all nodes and without a change.
    pub(super) quiet_processor: f64,
    pub(super) seconds: f64,
    /// Pods that were replaced.
    pub(super) replaced: usize,
    /// Bytes of watches that the API server had to say meanwhile, for each second.
    pub(super) watched: f64,
    pub(super) churn_processor: f64,
    /// The simulator's own, of one processor.
    pub(super) simulator_processor: f64,
    /// What other programs used meanwhile, in processors.
    pub(super) foreign: f64,
    pub(super) resident_most: u64,
    pub(super) resident_churned: u64,
    /// Bytes that a node's two processes are sent each second, TLS included.
    pub(super) bytes_per_node: f64,
    /// Resources and removals that nodes were sent, for each second.
    pub(super) told: f64,
    /// From a pod's place on a node until that node's agent knows it.
    pub(super) placed: Delay,
    /// From a pod's address until each proxy has it that is to have it.
    pub(super) with_address: Delay,
    /// From a pod's end until each of them knows.
    pub(super) gone: Delay,
    /// From the last change until every node had everything.
    pub(super) settled_after: f64,
    /// Lists that the control plane took more than one of each kind.
    pub(super) lists_again: f64,
}

impl Figures {
    /// Why the delays may be others'.
    fn doubts(&self) -> impl Iterator<Item = String> {
        let simulator = (self.simulator_processor > SIMULATOR_BUSY)
            .then(|| "the simulator had no processor left: delays may be its own".to_owned());
        let others = (self.foreign > OTHERS_BUSY)
            .then(|| "other programs used processors meanwhile: times and delays may be theirs".to_owned());
        simulator.into_iter().chain(others)
    }

    /// For people.
    pub(super) fn table(&self) -> String {
        let mb = |bytes: u64| format!("{:.0} MB", bytes as f64 / 1e6);
        let rows = [
            ("nodes, pods, Services", format!("{}, {}, {}", self.nodes, self.pods, self.services)),
            ("bytes of a pod's object", self.pod_bytes.to_string()),
            ("from start to ready", format!("{:.1} s, {:.1} s of processor", self.ready_after, self.ready_processor)),
            ("resident, ready", mb(self.resident_ready)),
            (
                "all nodes connect and report",
                format!("{:.1} s, {:.1} s of processor", self.connected_after, self.connected_processor),
            ),
            ("resident, all nodes connected", mb(self.resident_connected)),
            ("processor, all nodes, no change", format!("{:.3}", self.quiet_processor)),
            ("pods replaced", format!("{} in {:.1} s", self.replaced, self.seconds)),
            ("watches said", format!("{:.1} MB/s", self.watched / 1e6)),
            ("processor, churn", format!("{:.2} (simulator {:.2})", self.churn_processor, self.simulator_processor)),
            ("other programs meanwhile", format!("{:.2} processors", self.foreign)),
            ("resident, churn, most", mb(self.resident_most)),
            ("resident, after churn", mb(self.resident_churned)),
            ("told to nodes", format!("{:.0} resources/s", self.told)),
            ("bytes to a node", format!("{:.0} B/s", self.bytes_per_node)),
            ("pod placed, agent knows: p50, p99, most", self.placed.row()),
            ("pod has an address, proxy knows", self.with_address.row()),
            ("pod is gone, proxy knows", self.gone.row()),
            ("settled after the last change", format!("{:.1} s", self.settled_after)),
            ("lists taken again", format!("{:.0}", self.lists_again)),
        ];
        let rows = rows.into_iter().chain(self.doubts().map(|doubt| ("weak", doubt)));
        let rows: Vec<_> = rows.collect();
        let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
        let mut text = String::new();
        for (name, value) in rows {
            let _ = writeln!(text, "{name:width$}  {value}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_else_may_have_been_waited_for_is_said() {
        let doubts = |simulator_processor, foreign| {
            Figures { simulator_processor, foreign, ..Figures::default() }.table().matches("\nweak").count()
        };
        assert_eq!((doubts(0.5, 0.01), doubts(0.95, 0.01), doubts(0.95, 0.5)), (0, 1, 2));
    }

    #[test]
    fn a_delay_is_the_middle_the_end_and_the_most() {
        let delay = Delay::of((1..=1000).rev().map(f64::from).collect());
        assert_eq!((delay.count, delay.p50, delay.p99, delay.most), (1000, 501.0, 991.0, 1000.0));
        assert_eq!(Delay::of(Vec::new()).p99, 0.0);
    }
}
