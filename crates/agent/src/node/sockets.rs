//! Sockets that belong in pods, made for the proxy as it asks for them.

use mesh::PodUid;
use wire::pods::{FromAgent, SocketKind};

use super::{Node, lock};
use crate::capture::SocketKind as Made;

impl Node {
    /// A proxy, on the link of that number, asks for sockets: one batch of a kind for a pod at a time.
    pub(super) fn make_sockets(&mut self, number: u64, pod: PodUid, kind: SocketKind, count: usize) {
        let Some(link) = self.proxies.sender(number) else { return };
        let turn = self.batches.turn(&pod, kind);
        let capture = self.captures.get(&pod).map(|captured| captured.capture.clone());
        let (capture, mut turn) = match (capture, turn) {
            (Some(capture), Some(turn)) => (capture, turn),
            (capture, _) => {
                let error = match capture {
                    None => "this node captures no such pod",
                    Some(_) => "the last batch of that kind is still on its way",
                };
                if !link.send(&FromAgent::Sockets { pod, kind, error: error.into() }, Vec::new(), None) {
                    self.give_up(vec![number]);
                }
                return;
            }
        };
        let shown = self.shown.clone();
        tokio::spawn(async move {
            turn.wait().await;
            let made = tokio::task::spawn_blocking(move || lock(&capture).sockets(of(kind), count)).await;
            let (sockets, error) = match made {
                Ok(Ok(sockets)) => (sockets, String::new()),
                Ok(Err(error)) => (Vec::new(), error.to_string()),
                Err(panic) => (Vec::new(), panic.to_string()),
            };
            match error.is_empty() {
                true => shown.metrics.made(kind, sockets.len()),
                false => shown.metrics.not_made(kind),
            }
            // Where it does not read, its next request finds that out.
            link.send(&FromAgent::Sockets { pod, kind, error }, sockets, Some(turn));
        });
    }
}

fn of(kind: SocketKind) -> Made {
    match kind {
        SocketKind::OuterV4 => Made::OutV4,
        SocketKind::OuterV6 => Made::OutV6,
        SocketKind::InnerV4 => Made::InV4,
        SocketKind::InnerV6 => Made::InV6,
    }
}
