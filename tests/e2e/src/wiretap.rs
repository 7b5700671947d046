//! What passes a node's link: recorded by dumpcap, read by tshark.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use crate::cluster::Cluster;
use crate::program::{Program, Running};
use crate::streams::Streams;
use crate::view::{Family, text};
use crate::wait::{PATIENCE, eventually};

/// Reading a recording of some ten megabytes takes tshark seconds.
const READING: Duration = Duration::from_secs(60);

/// The fabric's own address, beyond the link that connects a node to the other one.
const BEYOND: &str = "10.88.0.1";
/// Nobody listens there, on no machine.
pub(crate) const DISCARD: &str = "9";
/// Signals do not reach every node, and the end of the input does.
const UNTIL_THE_INPUT_ENDS: &str = "dumpcap \"$@\" & read -r _; kill -TERM $!; wait $!";

/// A recording of a link.
pub struct Wiretap<'a> {
    file: PathBuf,
    recorder: Option<Running>,
    /// A program that sends a word through the link, as a datagram.
    send: Box<dyn Fn(&str) -> Program + 'a>,
}

impl Wiretap<'_> {
    /// Starts to record what passes `node`'s link to the other node. When this returns, packets are being recorded.
    #[track_caller]
    pub fn start<'a>(cluster: &'a Cluster, node: &str, name: &str) -> Wiretap<'a> {
        Wiretap::on_link(cluster, node, "eth0", BEYOND, name)
    }

    /// The same for a pod's link to its node.
    #[track_caller]
    pub fn of_pod<'a>(cluster: &'a Cluster, pod: &str, name: &str) -> Wiretap<'a> {
        let address = cluster.address(pod, Family::V4).to_string();
        let node = text(&cluster.pod(pod), "node").to_owned();
        let [_, _, third, fourth] = address.split('.').collect::<Vec<_>>()[..] else { panic!("{address}") };
        Wiretap::on_link(cluster, &node, &format!("pod-{third}-{fourth}"), &address, name)
    }

    #[track_caller]
    fn on_link<'a>(cluster: &'a Cluster, node: &str, link: &str, beyond: &str, name: &str) -> Wiretap<'a> {
        let file = cluster.folder().join(format!("{name}.pcapng"));
        let (from, beyond) = (node.to_owned(), beyond.to_owned());
        let send = move |word: &str| cluster.tcp_on(&from, &["datagram", &beyond, DISCARD, word]);
        Wiretap::record(|command| cluster.on_node(node, command), link, file, send)
    }

    /// Records what passes a link; `on` runs a command where the link is.
    #[track_caller]
    pub(crate) fn record<'a>(
        on: impl FnOnce(&[&str]) -> Program,
        link: &str,
        file: PathBuf,
        send: impl Fn(&str) -> Program + 'a,
    ) -> Wiretap<'a> {
        let (path, filter) = (file.display().to_string(), format!("tcp or udp port {DISCARD}"));
        let recorder = on(&["bash", "-c", UNTIL_THE_INPUT_ENDS, "bash"]);
        let mut recorder = recorder.args(["-q", "-i", link, "-B", "64", "-f", &filter, "-w", &path]).spawn();
        recorder.wait_for("File:");
        let tap = Wiretap { file, recorder: Some(recorder), send: Box::new(send) };
        tap.wait_for_a_word("begin");
        tap
    }

    /// Sends a datagram through the link and waits until it is in the recording: what passed before it is in there, too.
    #[track_caller]
    fn wait_for_a_word(&self, word: &str) {
        // Taps of other tests may record the same link.
        let word = format!("{word} of {}", self.file.display());
        eventually("the recording to reach now", PATIENCE, || {
            (self.send)(&word).run().ok();
            self.saw(&word)
        });
    }

    /// Ends the recording; every packet so far is in it, and none was lost.
    #[track_caller]
    pub fn stop(&mut self) {
        self.wait_for_a_word("end");
        let Some(recorder) = self.recorder.take() else { return };
        let end = recorder.finish(Duration::from_secs(20));
        let counted = end.stderr.lines().find(|line| line.contains("received/dropped")).unwrap_or_default();
        assert!(counted.contains("/0 ("), "the wiretap lost packets, so it proves nothing: {}", end.stderr);
    }

    /// The whole recording as bytes, headers included.
    #[track_caller]
    pub fn bytes(&self) -> Vec<u8> {
        fs::read(&self.file).expect("the recording is there")
    }

    /// Whether these bytes passed in clear, in one piece.
    #[track_caller]
    pub fn saw(&self, marker: &str) -> bool {
        let bytes = self.bytes();
        bytes.windows(marker.len()).any(|window| window == marker.as_bytes())
    }

    /// What tshark prints for the packets of `filter`: a line for each, the fields in their order, each field's values
    /// separated by commas. TCP on `port` is read as TLS.
    #[track_caller]
    pub fn fields(&self, port: u16, filter: &str, fields: &[&str]) -> Vec<Vec<String>> {
        let as_tls = format!("tcp.port=={port},tls");
        let mut arguments = vec!["-n", "-r", self.file.to_str().expect("a path of ours"), "-d", &as_tls, "-Y", filter];
        arguments.extend(["-T", "fields", "-E", "separator=|"]);
        arguments.extend(fields.iter().flat_map(|field| ["-e", field]));
        let printed = Program::new("tshark").args(arguments).env("HOME", "/nonexistent").within(READING).run().ok();
        printed.lines().map(|line| line.split('|').map(str::to_owned).collect()).collect()
    }

    /// The payload of every TCP connection to `port`, put together from its segments.
    #[track_caller]
    pub fn streams(&self, port: u16) -> Streams {
        let filter = format!("tcp.port == {port}");
        let fields = [
            "tcp.stream",
            "ip.src",
            "ipv6.src",
            "tcp.srcport",
            "ip.dst",
            "ipv6.dst",
            "tcp.dstport",
            "tcp.seq",
            "tcp.payload",
        ];
        Streams::from_segments(port, &self.fields(port, &filter, &fields))
    }
}
