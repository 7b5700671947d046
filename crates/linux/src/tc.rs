//! Filters on what leaves an interface: classic BPF at the `clsact` hook, behind everything that nftables does.
//!
//! They stand in no table, and a flush of the ruleset leaves them alone.

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcHeader, TcMessage, TcOption,
};

use crate::bpf::Instruction;
use crate::netlink::{Error, Raw, Socket, attributes};

/// Where filters on what leaves an interface hang.
const EGRESS: TcHandle = TcHandle { major: u16::MAX, minor: TcHandle::MIN_EGRESS };
/// The same for what arrives.
const INGRESS: TcHandle = TcHandle { major: u16::MAX, minor: TcHandle::MIN_INGRESS };
/// `ETH_P_ALL`: packets of every protocol.
const EVERY_PROTOCOL: u16 = 0x0003;
/// Of the only filter at its preference.
const HANDLE: TcHandle = TcHandle { major: 0, minor: 1 };
/// Attributes (`linux/rtnetlink.h`, `linux/gen_stats.h`, `linux/pkt_cls.h`).
const TCA_KIND: u16 = 1;
const TCA_OPTIONS: u16 = 2;
const TCA_STATS2: u16 = 7;
const TCA_STATS_QUEUE: u16 = 3;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_OPS_LEN: u16 = 4;
const TCA_BPF_OPS: u16 = 5;

/// What a program's answer means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Answer {
    /// All ones: the packet passes. 0: the next filter decides.
    Pass,
    /// It is the verdict itself, such as [`DROP`].
    Verdict,
}

/// Answer of a program with [`Answer::Pass`]: the packet passes.
pub const PASS: u32 = u32::MAX;
/// Answer of a program with [`Answer::Verdict`]: the packet is gone (`TC_ACT_SHOT`).
pub const DROP: u32 = 2;

/// A filter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filter {
    /// What the answer means.
    pub answer: Answer,
    /// What decides.
    pub program: Vec<Instruction>,
}

/// Makes these be the first filters on what leaves the interface, one for each preference from 1 on. They are written in
/// their order, each in one step: what is there already is exchanged, and never missing in between.
///
/// Where `clsact` is not there yet it is added, and the interface then loses what leaves by it for a moment: the kernel lets go
/// of all its queues, waits until nobody looks at them any more (an RCU grace period), and takes them up again
/// (`qdisc_graft` in `net/sched/sch_api.c`).
pub fn set(socket: &mut Socket, interface: u32, filters: &[Filter]) -> Result<(), Error> {
    let mut qdisc = message(interface, TcHandle::CLSACT, 0);
    qdisc.header.handle = TcHandle { major: u16::MAX, minor: 0 };
    qdisc.attributes = vec![TcAttribute::Kind("clsact".into())];
    let what = format!("add clsact to interface {interface}");
    match socket.request(&what, RouteNetlinkMessage::NewQueueDiscipline(qdisc), NLM_F_CREATE | NLM_F_EXCL) {
        Err(error) if error.errno() == Some(libc::EEXIST) => {}
        other => other?,
    }
    for (filter, preference) in filters.iter().zip(1..) {
        set_one(socket, interface, preference, filter)?;
    }
    Ok(())
}

/// How what stands differs from `filters`, in a few words; `None` when they stand, first and alone at their preferences.
pub fn difference(socket: &mut Socket, interface: u32, filters: &[Filter]) -> Result<Option<String>, Error> {
    let found = read(socket, interface, EGRESS)?;
    for (filter, preference) in filters.iter().zip(1..) {
        let wanted = Found { preference, handle: HANDLE.into(), protocol: EVERY_PROTOCOL, ..Found::of(filter) };
        let mut here = found.iter().filter(|it| it.preference == preference);
        let state = match (here.next(), here.next()) {
            (None, _) => "is missing",
            (Some(it), None) if *it == wanted => continue,
            (Some(_), None) => "differs",
            (Some(_), Some(_)) => "is not alone",
        };
        return Ok(Some(format!("the filter {preference} on interface {interface} {state}")));
    }
    Ok(None)
}

/// How many packets the filters of an interface have dropped since `clsact` was added to it; 0 where it is not there.
pub fn dropped(socket: &mut Socket, interface: u32) -> Result<u64, Error> {
    let question = RouteNetlinkMessage::GetQueueDiscipline(message(interface, TcHandle::UNSPEC, 0));
    let what = format!("read what was dropped on interface {interface}");
    for Raw { body, .. } in socket.dump(&what, Raw::of(&question))? {
        let (header, attributes) = parts(&what, &body)?;
        if !is_at(&header, interface, TcHandle::CLSACT) {
            continue;
        }
        let stats = attributes.iter().find(|(kind, _)| *kind == TCA_STATS2);
        let stats = nested(&what, stats.map_or(&[][..], |(_, bytes)| bytes))?;
        let queue = stats.iter().find(|(kind, _)| *kind == TCA_STATS_QUEUE);
        // `struct gnet_stats_queue`: length, backlog, drops…
        let drops = queue.and_then(|(_, bytes)| bytes.get(8..12)?.try_into().ok());
        return Ok(drops.map_or(0, u32::from_ne_bytes).into());
    }
    Ok(0)
}

/// Takes the first `count` filters away. What is not there is fine, an interface that is gone, too.
pub fn clear(socket: &mut Socket, interface: u32, count: u16) -> Result<(), Error> {
    // Backwards: the last ones drop.
    for preference in (1..=count).rev() {
        gone(delete(socket, interface, preference, TcHandle::UNSPEC))?;
    }
    Ok(())
}

/// The same, and takes away `clsact` when nobody else has a filter there. As when it is added, the interface then loses for a
/// moment what leaves by it.
pub fn remove(socket: &mut Socket, interface: u32, count: u16) -> Result<(), Error> {
    clear(socket, interface, count)?;
    for side in [EGRESS, INGRESS] {
        match read(socket, interface, side) {
            Ok(others) if others.is_empty() => {}
            Ok(_) => return Ok(()),
            Err(error) => return gone(Err(error)),
        }
    }
    let mut qdisc = message(interface, TcHandle::CLSACT, 0);
    qdisc.header.handle = TcHandle { major: u16::MAX, minor: 0 };
    let what = format!("delete clsact from interface {interface}");
    gone(socket.request(&what, RouteNetlinkMessage::DelQueueDiscipline(qdisc), 0))
}

fn set_one(socket: &mut Socket, interface: u32, preference: u16, filter: &Filter) -> Result<(), Error> {
    let here: Vec<Found> =
        read(socket, interface, EGRESS)?.into_iter().filter(|it| it.preference == preference).collect();
    // Of another kind or protocol: ours cannot stand beside it.
    if here.iter().any(|it| it.kind != TcFilterBpf::KIND || it.protocol != EVERY_PROTOCOL) {
        gone(delete(socket, interface, preference, TcHandle::UNSPEC))?;
    }
    let mut new = message(interface, EGRESS, preference);
    new.header.handle = HANDLE;
    new.attributes = vec![TcAttribute::Kind(TcFilterBpf::KIND.into()), TcAttribute::Options(options(filter))];
    let what = format!("add the filter {preference} to interface {interface}");
    socket.request(&what, RouteNetlinkMessage::NewTrafficFilter(new), NLM_F_CREATE | NLM_F_REPLACE)?;
    // A second one at the same preference may come before ours.
    for other in here.iter().filter(|it| it.kind == TcFilterBpf::KIND && it.handle != HANDLE.into()) {
        gone(delete(socket, interface, preference, other.handle.into()))?;
    }
    Ok(())
}

/// `TcHandle::UNSPEC`: all at that preference.
fn delete(socket: &mut Socket, interface: u32, preference: u16, handle: TcHandle) -> Result<(), Error> {
    let mut old = message(interface, EGRESS, preference);
    // Of whatever protocol.
    old.header.info = u32::from(preference) << 16;
    old.header.handle = handle;
    if handle != TcHandle::UNSPEC {
        old.header.info |= u32::from(EVERY_PROTOCOL.to_be());
    }
    let what = format!("delete the filter {preference} of interface {interface}");
    socket.request(&what, RouteNetlinkMessage::DelTrafficFilter(old), 0)
}

/// No filter, no `clsact`, or no interface any more.
fn gone(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)) => Ok(()),
        other => other,
    }
}

/// A filter as the kernel shows it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Found {
    preference: u16,
    protocol: u16,
    handle: u32,
    kind: String,
    program: Vec<u8>,
    is_verdict: bool,
}

impl Found {
    fn of(filter: &Filter) -> Found {
        Found {
            kind: TcFilterBpf::KIND.into(),
            program: filter.program.iter().flat_map(|it| it.bytes()).collect(),
            is_verdict: filter.answer == Answer::Verdict,
            ..Found::default()
        }
    }
}

fn read(socket: &mut Socket, interface: u32, side: TcHandle) -> Result<Vec<Found>, Error> {
    let question = RouteNetlinkMessage::GetTrafficFilter(message(interface, side, 0));
    let what = format!("read the filters of interface {interface}");
    let mut found = Vec::new();
    // Without `clsact` there is nothing, and no error.
    for Raw { body, .. } in socket.dump(&what, Raw::of(&question))? {
        let (header, attributes) = parts(&what, &body)?;
        // Each preference is told of once by itself, without a filter.
        if is_at(&header, interface, side) && header.handle != TcHandle::UNSPEC {
            found.push(shown(&what, &header, &attributes)?);
        }
    }
    Ok(found)
}

fn shown(what: &str, header: &TcHeader, attributes: &Attributes) -> Result<Found, Error> {
    let mut found = Found {
        preference: (header.info >> 16) as u16,
        protocol: u16::from_be(header.info as u16),
        handle: header.handle.into(),
        ..Found::default()
    };
    for (kind, value) in attributes {
        match *kind {
            TCA_KIND => found.kind = String::from_utf8_lossy(value.strip_suffix(&[0]).unwrap_or(value)).into_owned(),
            TCA_OPTIONS if found.kind == TcFilterBpf::KIND => {
                for (kind, value) in nested(what, value)? {
                    match kind {
                        TCA_BPF_OPS => found.program = value,
                        TCA_BPF_FLAGS => {
                            found.is_verdict = value == TcBpfFlags::DirectAction.bits().to_ne_bytes();
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Ok(found)
}

type Attributes = Vec<(u16, Vec<u8>)>;

/// Header and attributes of a message about traffic control. Not by the library: what others put there may be of kinds that it
/// cannot read, and must not hide what is ours.
fn parts(what: &str, body: &[u8]) -> Result<(TcHeader, Attributes), Error> {
    const HEADER: usize = 20;
    let header = TcHeader::parse(body).map_err(|error| malformed(what, error.to_string()))?;
    Ok((header, nested(what, &body[HEADER..])?))
}

fn nested(what: &str, bytes: &[u8]) -> Result<Attributes, Error> {
    attributes(bytes).map_err(|detail| malformed(what, detail))
}

fn malformed(what: &str, detail: String) -> Error {
    Error::Malformed { what: what.to_owned(), detail }
}

fn options(filter: &Filter) -> Vec<TcOption> {
    let count = filter.program.len() as u16;
    let program = filter.program.iter().flat_map(|it| it.bytes()).collect();
    let mut all = vec![
        TcFilterBpfOption::Other(DefaultNla::new(TCA_BPF_OPS_LEN, count.to_ne_bytes().to_vec())),
        TcFilterBpfOption::Other(DefaultNla::new(TCA_BPF_OPS, program)),
    ];
    if filter.answer == Answer::Verdict {
        all.push(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction));
    }
    all.into_iter().map(TcOption::Bpf).collect()
}

fn message(interface: u32, parent: TcHandle, preference: u16) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = interface as i32;
    message.header.parent = parent;
    if preference > 0 {
        message.header.info = u32::from(preference) << 16 | u32::from(EVERY_PROTOCOL.to_be());
    }
    message
}

fn is_at(header: &TcHeader, interface: u32, parent: TcHandle) -> bool {
    header.index == interface as i32 && header.parent == parent
}
