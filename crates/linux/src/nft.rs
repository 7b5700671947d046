//! nftables without the `nft` program: a table is a value, and loading it is one transaction.
//!
//! [`Table`] and what is in it say what shall be; [`replace`] makes it so, atomically; [`read`] says
//! what is, in the same [`Normal`] form that [`Table::normal`] has, so that "do my rules stand?" is
//! one comparison. `Display` writes a table in the language of the `nft` program, for people and
//! for tests, which load that text with the real program and compare.
//!
//! All tables are of the family `inet`: one set of rules for IPv4 and IPv6.

mod encode;
mod expression;
mod normal;
mod render;

use std::collections::BTreeSet;
use std::net::IpAddr;

use netlink_packet_core::{NLM_F_APPEND, NLM_F_CREATE};
use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, DataAttribute, GenAttribute, GenMessage, Hook as WireHook, InetHookNumber,
    ListAttribute, NfTablesMessage, RuleAttribute, RuleMessage, SetAttribute, SetElementAttribute, SetElementList,
    SetElementMessage, SetFlags, SetMessage, TableAttribute, TableMessage,
};
use netlink_packet_netfilter::none::ControlMessage;
use netlink_packet_netfilter::{NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily};

pub use expression::{AddressType, Compare, Direction, Expression, L4Protocol, Rule};
pub use normal::{Counter, Normal, counters, read};

use crate::netlink::{Error, Socket};

/// The most bytes of a rule's comment, as the `nft` program has it.
pub const LONGEST_COMMENT: usize = 127;

/// A table of the family `inet`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Unique in its network namespace.
    pub name: String,
    /// Connection-tracking time-outs that rules assign by name.
    pub timeouts: Vec<Timeout>,
    /// Sets of ports that rules look up by name.
    pub sets: Vec<PortSet>,
    /// Base chains, and chains to jump to.
    pub chains: Vec<Chain>,
}

/// How long connection tracking keeps a TCP flow of which one side has ended. A flow takes it when a
/// rule assigns it to the flow's first packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timeout {
    /// The object's name.
    pub name: String,
    /// The flows that may take it.
    pub family: IpFamily,
    /// After the first FIN, in seconds (the kernel's own: 120).
    pub fin_wait: u32,
    /// After that FIN's acknowledgement, in seconds (the kernel's own: 60).
    pub close_wait: u32,
}

/// A named set of TCP or UDP ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortSet {
    /// The set's name.
    pub name: String,
    /// Its elements.
    pub ports: BTreeSet<u16>,
}

/// A chain of rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// The chain's name.
    pub name: String,
    /// Where packets enter it by themselves; `None`: only by a jump.
    pub hook: Option<Hook>,
    /// The rules, in order.
    pub rules: Vec<Rule>,
}

/// The place of a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hook {
    /// What its verdicts may do.
    pub kind: ChainKind,
    /// On which way.
    pub point: HookPoint,
    /// Lower comes first: conntrack is -200, mangle -150, destination NAT -100, filter 0, source NAT 100.
    pub priority: i32,
    /// What becomes of a packet that no rule decided.
    pub policy: Policy,
}

/// The types of base chains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChainKind {
    /// Accepts and drops.
    Filter,
    /// Sees only the first packet of a flow, and may translate its addresses.
    Nat,
    /// A changed mark makes the packet look up its route again (hook output only).
    Route,
}

/// The hooks of the family `inet`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HookPoint {
    /// Arrived, not yet routed.
    Prerouting,
    /// For a socket of this namespace.
    Input,
    /// Passing through.
    Forward,
    /// Made here.
    Output,
    /// About to leave.
    Postrouting,
}

/// A base chain's default.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Passes.
    Accept,
    /// Dropped.
    Drop,
}

/// IPv4 or IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IpFamily {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpFamily {
    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

/// Makes the kernel's table be `table`, whatever it was before, in one transaction: no packet sees
/// half of a chain, flows that were translated stay so, and on an error everything is as it was.
///
/// Where the kernel has the same chains already only their rules change, and those of a chain at one moment. A table
/// that is taken out and put in anew has old and new chains side by side for an instant: a packet between the two meets
/// neither's rules, and what opens a flow then stays untranslated.
pub fn replace(socket: &mut Socket, table: &Table) -> Result<(), Error> {
    // What cannot be read, or was changed meanwhile, is made anew.
    let stands =
        normal::read_once(socket, &table.name).is_ok_and(|found| found.is_some_and(|it| table.normal().is_alike(&it)));
    if stands && load(socket, table, Change::InPlace).is_ok() {
        return Ok(());
    }
    load(socket, table, Change::Anew)
}

enum Change {
    /// Chains, sets and time-outs stay: they are as they are to be.
    InPlace,
    Anew,
}

fn load(socket: &mut Socket, table: &Table, change: Change) -> Result<(), Error> {
    let mut batch = Batch::new();
    match change {
        Change::InPlace => {
            batch.push(NfTablesMessage::DeleteRule(every_rule(&table.name)), 0);
            for set in &table.sets {
                batch.push(NfTablesMessage::DeleteSetElement(elements(&table.name, set, None)), 0);
            }
        }
        Change::Anew => {
            // Deleting what may not be there fails, so it is added first.
            batch.push(NfTablesMessage::NewTable(named(&table.name)), NLM_F_CREATE);
            batch.push(NfTablesMessage::DeleteTable(named(&table.name)), 0);
            batch.push(NfTablesMessage::NewTable(named(&table.name)), NLM_F_CREATE);
            for timeout in &table.timeouts {
                batch.push(NfTablesMessage::NewObject(encode::timeout(&table.name, timeout)), NLM_F_CREATE);
            }
            for (set, id) in table.sets.iter().zip(1..) {
                batch.push(new_set(&table.name, set, id), NLM_F_CREATE);
            }
            // All chains before the first rule, as a rule may jump to a chain that is written below it.
            for chain in &table.chains {
                batch.push(new_chain(&table.name, chain), NLM_F_CREATE);
            }
        }
    }
    for set in table.sets.iter().filter(|set| !set.ports.is_empty()) {
        let ports = elements(&table.name, set, Some(&set.ports));
        batch.push(NfTablesMessage::NewSetElement(ports), NLM_F_CREATE);
    }
    for chain in &table.chains {
        for rule in &chain.rules {
            batch.push(new_rule(&table.name, &chain.name, rule), NLM_F_CREATE | NLM_F_APPEND);
        }
    }
    batch.commit(socket, &format!("load the nftables table {}", table.name))
}

/// Removes a table; `false` when there was none.
///
/// Never under flows that it translated: their next packets would go out in clear, to the original
/// destination (T3).
pub fn delete(socket: &mut Socket, name: &str) -> Result<bool, Error> {
    let mut batch = Batch::new();
    batch.push(NfTablesMessage::DeleteTable(named(name)), 0);
    match batch.commit(socket, &format!("delete the nftables table {name}")) {
        Ok(()) => Ok(true),
        Err(error) if error.errno() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The number that grows with each change of any table in the namespace. Equal numbers mean that
/// nothing was changed.
pub fn generation(socket: &mut Socket) -> Result<u32, Error> {
    let what = "read the generation of nftables";
    let question = NfTablesMessage::GetGen(GenMessage { attributes: Vec::new() });
    let answer = socket.ask(what, message(NetfilterProtoFamily::Unspec, question), 0)?;
    let NetfilterMessageInner::NfTables(NfTablesMessage::NewGen(generation)) = answer.inner else {
        return Err(malformed(what, "not a generation"));
    };
    generation
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            GenAttribute::Id(id) => Some(*id),
            _ => None,
        })
        .ok_or_else(|| malformed(what, "no number in it"))
}

/// A transaction under construction.
struct Batch {
    messages: Vec<(NetfilterMessage, u16)>,
}

impl Batch {
    fn new() -> Batch {
        Batch { messages: vec![(mark(ControlMessage::BatchBegin), 0)] }
    }

    fn push(&mut self, change: NfTablesMessage, flags: u16) {
        self.messages.push((message(NetfilterProtoFamily::Inet, change), flags));
    }

    fn commit(mut self, socket: &mut Socket, what: &str) -> Result<(), Error> {
        self.messages.push((mark(ControlMessage::BatchEnd), 0));
        // The closing mark is not answered (kernels before 6.10).
        socket.batch_until(what, self.messages, 1)
    }
}

fn mark(control: ControlMessage) -> NetfilterMessage {
    // The resource id of the marks is the subsystem of what is between them: nftables.
    const NFNL_SUBSYS_NFTABLES: u16 = 10;
    NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::Unspec, 0, NFNL_SUBSYS_NFTABLES), control)
}

fn message(family: NetfilterProtoFamily, inner: NfTablesMessage) -> NetfilterMessage {
    NetfilterMessage::new(NetfilterHeader::new(family, 0, 0), inner)
}

fn named(table: &str) -> TableMessage {
    TableMessage { attributes: vec![TableAttribute::Name(table.to_owned())] }
}

fn malformed(what: &str, detail: &str) -> Error {
    Error::Malformed { what: what.to_owned(), detail: detail.to_owned() }
}

fn new_chain(table: &str, chain: &Chain) -> NfTablesMessage {
    let mut attributes = vec![ChainAttribute::Table(table.to_owned()), ChainAttribute::Name(chain.name.clone())];
    if let Some(hook) = &chain.hook {
        attributes.extend([
            ChainAttribute::Hook(vec![
                WireHook::Number(InetHookNumber::from(hook.point.number()).into()),
                // The kernel reads the same bits as a signed number.
                WireHook::Priority(hook.priority as u32),
            ]),
            ChainAttribute::Policy(hook.policy.verdict()),
            ChainAttribute::Type(hook.kind.as_str().to_owned()),
        ]);
    }
    NfTablesMessage::NewChain(ChainMessage { attributes })
}

fn new_rule(table: &str, chain: &str, rule: &Rule) -> NfTablesMessage {
    let mut attributes = vec![
        RuleAttribute::Table(table.to_owned()),
        RuleAttribute::Chain(chain.to_owned()),
        RuleAttribute::Expressions(encode::rule(rule).into_iter().map(Into::into).collect()),
    ];
    if let Some(comment) = encode::comment(rule) {
        attributes.push(RuleAttribute::UserData(comment));
    }
    NfTablesMessage::NewRule(RuleMessage { attributes })
}

fn new_set(table: &str, set: &PortSet, id: u32) -> NfTablesMessage {
    /// What `nft` calls `inet_service`; the kernel keeps it for readers.
    const TYPE_INET_SERVICE: u32 = 13;
    NfTablesMessage::NewSet(SetMessage {
        attributes: vec![
            SetAttribute::Table(table.to_owned()),
            SetAttribute::Name(set.name.clone()),
            SetAttribute::Flags(SetFlags::empty()),
            SetAttribute::KeyType(TYPE_INET_SERVICE),
            SetAttribute::KeyLen(2),
            SetAttribute::Id(id),
        ],
    })
}

/// Elements of a set; without them, all that it has.
fn elements(table: &str, set: &PortSet, ports: Option<&BTreeSet<u16>>) -> SetElementMessage {
    let element = |port: &u16| {
        let key = DataAttribute::Value(port.to_be_bytes().to_vec());
        ListAttribute::Element(vec![SetElementAttribute::Key(key)])
    };
    let mut attributes = vec![SetElementList::Table(table.to_owned()), SetElementList::Set(set.name.clone())];
    attributes.extend(ports.map(|ports| SetElementList::Elements(ports.iter().map(element).collect())));
    SetElementMessage { attributes }
}

fn every_rule(table: &str) -> RuleMessage {
    RuleMessage { attributes: vec![RuleAttribute::Table(table.to_owned())] }
}

impl HookPoint {
    /// `enum nf_inet_hooks`.
    fn number(self) -> u32 {
        match self {
            HookPoint::Prerouting => 0,
            HookPoint::Input => 1,
            HookPoint::Forward => 2,
            HookPoint::Output => 3,
            HookPoint::Postrouting => 4,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            HookPoint::Prerouting => "prerouting",
            HookPoint::Input => "input",
            HookPoint::Forward => "forward",
            HookPoint::Output => "output",
            HookPoint::Postrouting => "postrouting",
        }
    }
}

impl ChainKind {
    fn as_str(self) -> &'static str {
        match self {
            ChainKind::Filter => "filter",
            ChainKind::Nat => "nat",
            ChainKind::Route => "route",
        }
    }
}

impl Policy {
    /// `NF_DROP`, `NF_ACCEPT`.
    fn verdict(self) -> u32 {
        match self {
            Policy::Drop => 0,
            Policy::Accept => 1,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Policy::Accept => "accept",
            Policy::Drop => "drop",
        }
    }
}

impl IpFamily {
    /// `NFPROTO_IPV4`, `NFPROTO_IPV6`.
    fn number(self) -> u8 {
        match self {
            IpFamily::V4 => 2,
            IpFamily::V6 => 10,
        }
    }
}
