//! What the kernel has, in a form that can be compared with what it was given.
//!
//! The kernel gives each object a handle, counts into counters, and writes out defaults that were
//! left open. [`Normal`] is what remains without those. What this module does not know stays in, and
//! so makes a difference: a table that somebody changed is never taken for ours.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use netlink_packet_core::{DefaultNla, Emitable, Nla};
use netlink_packet_netfilter::nftables::{
    ChainAttribute, ChainMessage, DataAttribute, ExpressionAttribute, Expressions, Hook as WireHook, HookNumber,
    InetHookNumber, ListAttribute, NfTablesMessage, RuleAttribute, RuleMessage, SetAttribute, SetElementAttribute,
    SetElementList, SetElementMessage, SetMessage, TableAttribute, TableFlags, TableMessage,
};
use netlink_packet_netfilter::{NetfilterMessageInner, NetfilterProtoFamily};

use super::encode::{self, object};
use super::{Table, generation, malformed, message, named};
use crate::netlink::{Error, Socket, attributes};

/// How often a table is read again that changes while it is read.
const ATTEMPTS: usize = 8;

/// A table without handles, counts and defaults.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Normal {
    /// Flags of the table. A dormant table has all its rules and does nothing.
    flags: u32,
    chains: BTreeMap<String, Chain>,
    /// Name to elements.
    sets: BTreeMap<String, BTreeSet<Vec<u8>>>,
    timeouts: BTreeMap<String, Timeout>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Chain {
    /// Type, hook, priority, policy.
    base: Option<(String, u32, i32, u32)>,
    rules: Vec<Rule>,
}

#[derive(Clone, PartialEq, Eq, Default)]
struct Rule {
    /// Name and attributes of each.
    expressions: Vec<(String, BTreeMap<u16, Vec<u8>>)>,
    comment: String,
}

/// Family, protocol, and seconds in FIN_WAIT and CLOSE_WAIT, as the kernel writes them.
type Timeout = [Option<Vec<u8>>; 4];

/// A counter in a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counter {
    /// The rule's chain.
    pub chain: String,
    /// The rule's reason.
    pub why: String,
    /// Packets that came so far in the rule.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Table {
    /// What [`read`] finds when this table stands as it was loaded.
    pub fn normal(&self) -> Normal {
        let chain = |chain: &super::Chain| Chain {
            base: chain
                .hook
                .map(|hook| (hook.kind.as_str().to_owned(), hook.point.number(), hook.priority, hook.policy.verdict())),
            rules: chain.rules.iter().map(expected_rule).collect(),
        };
        let timeout = |timeout: &super::Timeout| {
            let encoded = encode::timeout(&self.name, timeout);
            let data = encoded.iter().find(|attribute| is(attribute, object::DATA));
            data.map(|data| normal_timeout(&bytes(data))).unwrap_or_default()
        };
        Normal {
            flags: 0,
            chains: self.chains.iter().map(|it| (it.name.clone(), chain(it))).collect(),
            sets: self
                .sets
                .iter()
                .map(|set| {
                    let ports = set.ports.iter().map(|port| port.to_be_bytes().to_vec());
                    (set.name.clone(), ports.collect())
                })
                .collect(),
            timeouts: self.timeouts.iter().map(|it| (it.name.clone(), timeout(it))).collect(),
        }
    }
}

impl Normal {
    /// The first thing in which `found` is not what `self` says, in a sentence; `None` when the two are equal.
    pub fn difference(&self, found: &Normal) -> Option<String> {
        if self.flags != found.flags {
            return Some(format!("the table's flags are {:#x}, not {:#x}", found.flags, self.flags));
        }
        if let Some(name) = differing(&self.timeouts, &found.timeouts) {
            return Some(format!("the time-out object {name} differs"));
        }
        if let Some(name) = differing(&self.sets, &found.sets) {
            return Some(format!("the set {name} differs"));
        }
        let name = differing(&self.chains, &found.chains)?;
        let (Some(ours), Some(theirs)) = (self.chains.get(name), found.chains.get(name)) else {
            let how = if self.chains.contains_key(name) { "is missing" } else { "is not ours" };
            return Some(format!("the chain {name} {how}"));
        };
        if ours.base != theirs.base {
            return Some(format!("the chain {name} is hooked differently"));
        }
        if ours.rules.len() != theirs.rules.len() {
            let (count, want) = (theirs.rules.len(), ours.rules.len());
            return Some(format!("the chain {name} has {count} rules, not {want}"));
        }
        let differs = ours.rules.iter().zip(&theirs.rules).position(|(a, b)| a != b)?;
        Some(format!("rule {} of the chain {name} differs", differs + 1))
    }
}

impl Normal {
    /// Whether only rules and elements of sets may differ: chains are the same and hooked the same, and time-outs are equal.
    pub(super) fn is_alike(&self, found: &Normal) -> bool {
        let same_chains = self.chains.len() == found.chains.len()
            && self.chains.iter().zip(&found.chains).all(|((a, one), (b, other))| a == b && one.base == other.base);
        self.flags == found.flags
            && same_chains
            && self.timeouts == found.timeouts
            && self.sets.keys().eq(found.sets.keys())
    }

    /// The marks that the rules of a chain compare a packet's with, in order: what a table that an earlier process loaded
    /// takes for its own.
    pub fn marks(&self, chain: &str) -> Vec<u32> {
        let rules = self.chains.get(chain).into_iter().flat_map(|chain| &chain.rules);
        rules
            .flat_map(|rule| rule.expressions.windows(2))
            .filter_map(|pair| compared_mark(&pair[0], &pair[1]))
            .collect()
    }
}

/// The mark, where `load` loads that of the packet and `compare` compares it.
fn compared_mark(load: &(String, BTreeMap<u16, Vec<u8>>), compare: &(String, BTreeMap<u16, Vec<u8>>)) -> Option<u32> {
    // NFTA_META_KEY, NFT_META_MARK and NFTA_CMP_DATA of `linux/netfilter/nf_tables.h`.
    const KEY: u16 = 2;
    const MARK: u64 = 3;
    const DATA: u16 = 3;
    let is_mark = load.0 == "meta" && load.1.get(&KEY).and_then(|it| big_endian(it)) == Some(MARK);
    let data = compare.1.get(&DATA).filter(|_| is_mark && compare.0 == "cmp")?;
    // Behind the header of the attribute that holds the value.
    data.get(4..8).and_then(|value| value.try_into().ok()).map(u32::from_ne_bytes)
}

/// The first key that is not in both maps with the same value.
fn differing<'a, V: PartialEq>(ours: &'a BTreeMap<String, V>, theirs: &'a BTreeMap<String, V>) -> Option<&'a String> {
    ours.keys().chain(theirs.keys()).find(|key| ours.get(*key) != theirs.get(*key))
}

/// Reads a table; `None` when there is none of that name.
pub fn read(socket: &mut Socket, name: &str) -> Result<Option<Normal>, Error> {
    // Several dumps make one table, so nothing may change between the first and the last of them.
    for _ in 0..ATTEMPTS {
        let before = generation(socket)?;
        let found = read_once(socket, name)?;
        if generation(socket)? == before {
            return Ok(found);
        }
    }
    Err(Error::Unstable { what: format!("read the nftables table {name}") })
}

/// All counters in the rules of a table, in order; none when there is no such table.
pub fn counters(socket: &mut Socket, table: &str) -> Result<Vec<Counter>, Error> {
    let mut counters = Vec::new();
    for rule in rules(socket, table)? {
        for (name, attributes) in expressions(&rule.expressions)? {
            if name == "counter" {
                let count = |kind| attributes.get(&kind).and_then(|it| big_endian(it)).unwrap_or(0);
                counters.push(Counter {
                    chain: rule.chain.clone(),
                    why: rule.comment.clone(),
                    packets: count(COUNTER_PACKETS),
                    bytes: count(COUNTER_BYTES),
                });
            }
        }
    }
    Ok(counters)
}

/// As [`read`], where something may change meanwhile.
pub(super) fn read_once(socket: &mut Socket, table: &str) -> Result<Option<Normal>, Error> {
    let Some(flags) = table_flags(socket, table)? else { return Ok(None) };
    let mut found = Normal { flags, ..Normal::default() };
    let question = NfTablesMessage::GetChain(ChainMessage { attributes: vec![] });
    for answer in dump(socket, "read the chains", question)? {
        if let NfTablesMessage::NewChain(chain) = answer
            && let Some((name, chain)) = read_chain(&chain, table)
        {
            found.chains.insert(name, chain);
        }
    }
    for rule in rules(socket, table)? {
        let normal = Rule { expressions: without_defaults(expressions(&rule.expressions)?), comment: rule.comment };
        found.chains.entry(rule.chain).or_default().rules.push(normal);
    }
    for set in set_names(socket, table)? {
        let elements = set_elements(socket, table, &set)?;
        found.sets.insert(set, elements);
    }
    found.timeouts = timeouts(socket, table)?;
    Ok(Some(found))
}

fn dump(socket: &mut Socket, what: &str, question: NfTablesMessage) -> Result<Vec<NfTablesMessage>, Error> {
    let answers = socket.dump(what, message(NetfilterProtoFamily::Inet, question))?;
    Ok(answers
        .into_iter()
        .filter_map(|answer| match answer.inner {
            NetfilterMessageInner::NfTables(inner) => Some(inner),
            _ => None,
        })
        .collect())
}

fn table_flags(socket: &mut Socket, table: &str) -> Result<Option<u32>, Error> {
    let what = format!("read the nftables table {table}");
    let question = NfTablesMessage::GetTable(named(table));
    let answer = match socket.ask(&what, message(NetfilterProtoFamily::Inet, question), 0) {
        Ok(answer) => answer,
        Err(error) if error.errno() == Some(libc::ENOENT) => return Ok(None),
        Err(error) => return Err(error),
    };
    let NetfilterMessageInner::NfTables(NfTablesMessage::NewTable(TableMessage { attributes })) = answer.inner else {
        return Err(malformed(&what, "not a table"));
    };
    let flags = attributes.iter().find_map(|attribute| match attribute {
        TableAttribute::Flags(flags) => Some(*flags),
        _ => None,
    });
    Ok(Some(flags.unwrap_or(TableFlags::empty()).bits()))
}

/// `None` when the chain is another table's.
fn read_chain(chain: &ChainMessage, table: &str) -> Option<(String, Chain)> {
    let (mut name, mut kind, mut hook, mut priority, mut policy) = (None, None, None, 0, 0);
    for attribute in &chain.attributes {
        match attribute {
            ChainAttribute::Table(of) if of != table => return None,
            ChainAttribute::Name(it) => name = Some(it.clone()),
            ChainAttribute::Type(it) => kind = Some(it.clone()),
            ChainAttribute::Policy(it) => policy = *it,
            ChainAttribute::Hook(parts) => {
                for part in parts {
                    match part {
                        WireHook::Number(number) => hook = Some(hook_number(number)),
                        WireHook::Priority(it) => priority = *it as i32,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    let base = hook.map(|hook| (kind.unwrap_or_default(), hook, priority, policy));
    Some((name?, Chain { base, rules: Vec::new() }))
}

fn hook_number(number: &HookNumber) -> u32 {
    match number {
        HookNumber::Inet(number) => u32::from(*number),
        other => u32::from(InetHookNumber::from(u32::from(*other))),
    }
}

/// A rule as it was read.
struct RawRule {
    chain: String,
    expressions: Vec<ListAttribute<ExpressionAttribute>>,
    comment: String,
}

/// All rules of a table, those of each chain in their order.
fn rules(socket: &mut Socket, table: &str) -> Result<Vec<RawRule>, Error> {
    let question = NfTablesMessage::GetRule(RuleMessage { attributes: vec![RuleAttribute::Table(table.to_owned())] });
    let mut rules = Vec::new();
    for answer in dump(socket, "read the rules", question)? {
        let NfTablesMessage::NewRule(rule) = answer else { continue };
        let (mut of, mut chain, mut code, mut comment) = (None, None, Vec::new(), String::new());
        for attribute in rule.attributes {
            match attribute {
                RuleAttribute::Table(it) => of = Some(it),
                RuleAttribute::Chain(it) => chain = Some(it),
                RuleAttribute::Expressions(it) => code = it,
                RuleAttribute::UserData(it) => comment = encode::comment_text(&it),
                _ => {}
            }
        }
        if of.as_deref() == Some(table) {
            let chain = chain.ok_or_else(|| malformed("read the rules", "a rule in no chain"))?;
            rules.push(RawRule { chain, expressions: code, comment });
        }
    }
    Ok(rules)
}

fn set_names(socket: &mut Socket, table: &str) -> Result<Vec<String>, Error> {
    let question = NfTablesMessage::GetSet(SetMessage { attributes: vec![SetAttribute::Table(table.to_owned())] });
    let mut names = Vec::new();
    for answer in dump(socket, "read the sets", question)? {
        let NfTablesMessage::NewSet(set) = answer else { continue };
        for attribute in set.attributes {
            if let SetAttribute::Name(name) = attribute {
                names.push(name);
            }
        }
    }
    Ok(names)
}

fn set_elements(socket: &mut Socket, table: &str, set: &str) -> Result<BTreeSet<Vec<u8>>, Error> {
    let question = NfTablesMessage::GetSetElement(SetElementMessage {
        attributes: vec![SetElementList::Table(table.to_owned()), SetElementList::Set(set.to_owned())],
    });
    let mut elements = BTreeSet::new();
    for answer in dump(socket, "read the elements of a set", question)? {
        let NfTablesMessage::NewSetElement(list) = answer else { continue };
        for attribute in list.attributes {
            let SetElementList::Elements(found) = attribute else { continue };
            for element in found {
                let ListAttribute::Element(parts) = element else { continue };
                elements.extend(parts.into_iter().filter_map(|part| match part {
                    SetElementAttribute::Key(DataAttribute::Value(key)) => Some(key),
                    _ => None,
                }));
            }
        }
    }
    Ok(elements)
}

fn timeouts(socket: &mut Socket, table: &str) -> Result<BTreeMap<String, Timeout>, Error> {
    let mut table_name = table.as_bytes().to_vec();
    table_name.push(0);
    let question = NfTablesMessage::GetObject(vec![DefaultNla::new(object::TABLE, table_name)]);
    let mut found = BTreeMap::new();
    for answer in dump(socket, "read the time-out objects", question)? {
        let NfTablesMessage::NewObject(attributes) = answer else { continue };
        let of = |kind| attributes.iter().find(|attribute| is(attribute, kind)).map(bytes);
        let name = of(object::NAME).unwrap_or_default();
        let name = String::from_utf8_lossy(name.strip_suffix(&[0]).unwrap_or(&name)).into_owned();
        let is_timeout = of(object::TYPE).is_some_and(|it| it == encode::OBJECT_TIMEOUT.to_be_bytes());
        // An object of another type is not ours: it has no values, and so equals nothing that is.
        let data = of(object::DATA).filter(|_| is_timeout);
        found.insert(name, data.map(|data| normal_timeout(&data)).unwrap_or_default());
    }
    Ok(found)
}

fn normal_timeout(data: &[u8]) -> Timeout {
    let inside = |bytes: &[u8], kind| {
        let all = attributes(bytes).ok()?;
        all.into_iter().find(|(it, _)| *it == kind).map(|(_, value)| value)
    };
    let states = inside(data, object::STATES).unwrap_or_default();
    [
        inside(data, object::L3),
        inside(data, object::L4),
        inside(&states, object::FIN_WAIT),
        inside(&states, object::CLOSE_WAIT),
    ]
}

fn expected_rule(rule: &super::Rule) -> Rule {
    let code: Vec<_> = encode::rule(rule).into_iter().map(Into::into).collect();
    Rule {
        // What this crate encoded it can decode; were it not so, the empty list would equal no rule.
        expressions: without_defaults(expressions(&code).unwrap_or_default()),
        comment: encode::comment(rule).map(|it| encode::comment_text(&it)).unwrap_or_default(),
    }
}

type NamedExpressions = Vec<(String, BTreeMap<u16, Vec<u8>>)>;

/// Name and attributes of each expression.
fn expressions(code: &[ListAttribute<ExpressionAttribute>]) -> Result<NamedExpressions, Error> {
    let mut all = Vec::new();
    for element in code {
        let ListAttribute::Element(parts) = element else { continue };
        let (mut name, mut data) = (String::new(), BTreeMap::new());
        for part in parts {
            match part {
                ExpressionAttribute::Name(it) => name.clone_from(it),
                ExpressionAttribute::Data(it) => data = expression_attributes(it)?,
                _ => {}
            }
        }
        all.push((name, data));
    }
    Ok(all)
}

fn expression_attributes(data: &Expressions) -> Result<BTreeMap<u16, Vec<u8>>, Error> {
    let mut bytes = vec![0; data.buffer_len()];
    data.emit(&mut bytes);
    let all = attributes(&bytes).map_err(|detail| malformed("read a rule", &detail))?;
    Ok(all.into_iter().collect())
}

const COUNTER_BYTES: u16 = 1;
const COUNTER_PACKETS: u16 = 2;

/// Leaves out what the kernel adds by itself.
fn without_defaults(expressions: NamedExpressions) -> NamedExpressions {
    const BITWISE_OPERATION: u16 = 6;
    const LOOKUP_FLAGS: u16 = 5;
    const NUMGEN_OFFSET: u16 = 4;
    const NAT_FLAGS: u16 = 7;
    /// Set by the kernel where an address is given.
    const NAT_MAP_ADDRESS: u32 = 1;
    let mut expressions = expressions;
    for (name, attributes) in &mut expressions {
        attributes.retain(|kind, value| match (name.as_str(), *kind) {
            ("counter", COUNTER_BYTES | COUNTER_PACKETS) => false,
            ("bitwise", BITWISE_OPERATION) | ("lookup", LOOKUP_FLAGS) | ("numgen", NUMGEN_OFFSET) => {
                value.iter().any(|byte| *byte != 0)
            }
            _ => true,
        });
        if name == "nat"
            && let Some(flags) = attributes.get_mut(&NAT_FLAGS)
            && let Some(number) = big_endian(flags)
        {
            let number = number as u32 & !NAT_MAP_ADDRESS;
            *flags = number.to_be_bytes().to_vec();
            if number == 0 {
                attributes.remove(&NAT_FLAGS);
            }
        }
    }
    expressions
}

fn big_endian(bytes: &[u8]) -> Option<u64> {
    (bytes.len() <= 8).then(|| bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
}

fn is(attribute: &DefaultNla, kind: u16) -> bool {
    attribute.kind() & netlink_packet_core::NLA_TYPE_MASK == kind
}

fn bytes(attribute: &DefaultNla) -> Vec<u8> {
    let mut bytes = vec![0; attribute.value_len()];
    attribute.emit_value(&mut bytes);
    bytes
}

impl fmt::Debug for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}:", self.comment)?;
        for (name, attributes) in &self.expressions {
            write!(f, " [{name}")?;
            for (kind, value) in attributes {
                write!(f, " {kind}=")?;
                value.iter().try_for_each(|byte| write!(f, "{byte:02x}"))?;
            }
            write!(f, "]")?;
        }
        Ok(())
    }
}
