//! Rules as the kernel's small machine runs them: load into a register, compare, act.
//!
//! Numbers are those of `linux/netfilter/nf_tables.h`; the attributes are what `nft --debug=netlink`
//! shows, and a test compares with that program.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use netlink_packet_core::{DefaultNla, Emitable, NLA_F_NESTED};
use netlink_packet_netfilter::nftables::{
    Bitwise, Cmp, DataAttribute, Expressions, Immediate, Lookup, Meta, MetaKey, Operator, Payload, Register, Verdict,
    VerdictAttribute,
};

use super::expression::{AddressType, Compare, Direction, Expression, L4Protocol, Rule};
use super::{IpFamily, LONGEST_COMMENT, Timeout};

/// The interface index of `lo`, in every network namespace.
const LOOPBACK: u32 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;
/// `IPS_DST_NAT`.
const STATUS_DESTINATION_TRANSLATED: u32 = 1 << 5;
/// `NF_CT_STATE_INVALID_BIT`.
const STATE_INVALID: u32 = 1;
/// `NFT_SOCKET_TRANSPARENT`.
const SOCKET_TRANSPARENT: u32 = 0;
/// `NFT_SOCKET_MARK`.
const SOCKET_MARK: u32 = 1;
/// `NF_NAT_RANGE_PROTO_SPECIFIED`.
const RANGE_HAS_PORT: u32 = 2;

/// The expressions of a rule, each with its preconditions before it.
pub(super) fn rule(rule: &Rule) -> Vec<Expressions> {
    let mut machine = Machine::default();
    for expression in &rule.expressions {
        machine.add(expression);
    }
    machine.code
}

/// A rule's comment in the form in which `nft` stores and shows it: type 0, length, text with a 0.
pub(super) fn comment(rule: &Rule) -> Option<Vec<u8>> {
    const COMMENT: u8 = 0;
    if rule.why.is_empty() {
        return None;
    }
    let text = &rule.why.as_bytes()[..rule.why.len().min(LONGEST_COMMENT)];
    let mut data = vec![COMMENT, text.len() as u8 + 1];
    data.extend(text);
    data.push(0);
    Some(data)
}

/// The text in a rule's user data, empty when there is none.
pub(super) fn comment_text(data: &[u8]) -> String {
    match data {
        [0, length, text @ ..] => {
            let text = &text[..text.len().min(usize::from(*length))];
            String::from_utf8_lossy(text.strip_suffix(&[0]).unwrap_or(text)).into_owned()
        }
        _ => String::new(),
    }
}

/// `NFT_OBJECT_CT_TIMEOUT`.
pub(super) const OBJECT_TIMEOUT: u32 = 7;
/// Attributes of an object.
pub(super) mod object {
    pub(in super::super) const TABLE: u16 = 1;
    pub(in super::super) const NAME: u16 = 2;
    pub(in super::super) const TYPE: u16 = 3;
    pub(in super::super) const DATA: u16 = 4;
    /// Of the data of a time-out: family, protocol, seconds by state.
    pub(in super::super) const L3: u16 = 1;
    pub(in super::super) const L4: u16 = 2;
    pub(in super::super) const STATES: u16 = 3;
    /// Of the states of TCP.
    pub(in super::super) const FIN_WAIT: u16 = 4;
    pub(in super::super) const CLOSE_WAIT: u16 = 5;
}

/// The attributes of the object that a time-out is.
pub(super) fn timeout(table: &str, timeout: &Timeout) -> Vec<DefaultNla> {
    let states = vec![number(object::FIN_WAIT, timeout.fin_wait), number(object::CLOSE_WAIT, timeout.close_wait)];
    let data = vec![
        DefaultNla::new(object::L3, u16::from(timeout.family.number()).to_be_bytes().to_vec()),
        DefaultNla::new(object::L4, vec![TCP]),
        nested(object::STATES, &states),
    ];
    vec![
        text(object::TABLE, table),
        text(object::NAME, &timeout.name),
        number(object::TYPE, OBJECT_TIMEOUT),
        nested(object::DATA, &data),
    ]
}

#[derive(Default)]
struct Machine {
    code: Vec<Expressions>,
    family: Option<IpFamily>,
    protocol: Option<L4Protocol>,
}

impl Machine {
    fn add(&mut self, expression: &Expression) {
        use Expression as E;
        match expression {
            E::Mark(compare, mark) => {
                self.load_meta(MetaKey::Mark);
                self.compare(*compare, &mark.to_ne_bytes());
            }
            E::FromLoopback(compare) => {
                self.load_meta(MetaKey::Iif);
                self.compare(*compare, &LOOPBACK.to_ne_bytes());
            }
            E::Forwarded => {
                self.load_meta(MetaKey::Iif);
                self.compare(Compare::IsNot, &0u32.to_ne_bytes());
            }
            E::Family(family) => self.require_family(*family),
            E::Protocol(protocol) => self.require_protocol(*protocol),
            E::Source(compare, network) => self.address(*compare, network, Side::Source),
            E::Destination(compare, network) => self.address(*compare, network, Side::Destination),
            E::SourceType(compare, kind) => self.address_type(*compare, *kind, Side::Source),
            E::DestinationType(compare, kind) => {
                self.address_type(*compare, *kind, Side::Destination);
            }
            E::TcpSyn => self.flags(FIN | SYN | RST | ACK, SYN),
            E::TcpReset => self.flags(RST, RST),
            E::SourcePort(compare, port) => {
                self.load_port(0);
                self.compare(*compare, &port.to_be_bytes());
            }
            E::DestinationPort(compare, port) => {
                self.load_port(2);
                self.compare(*compare, &port.to_be_bytes());
            }
            E::DestinationPortIn(set) => {
                self.load_port(2);
                self.code
                    .push(Expressions::Lookup(vec![Lookup::Set(set.clone()), Lookup::SourceRegister(Register::Reg1)]));
            }
            E::HasSocket => self.has_socket(),
            E::SocketMark(compare, mark) => {
                self.load_socket(SOCKET_MARK);
                self.compare(*compare, &mark.to_ne_bytes());
            }
            E::OriginalZone(compare, zone) => {
                let key = [register(CT_DREG, Register::Reg1), number(CT_KEY, FLOW_ZONE), original()];
                self.other("ct", key.into());
                self.compare(*compare, &zone.to_ne_bytes());
            }
            E::FlowDirection(direction) => {
                self.load_flow(FLOW_DIRECTION);
                self.compare(Compare::Is, &[*direction as u8]);
            }
            E::FlowInvalid => self.flow_bit(FLOW_STATE, STATE_INVALID, Compare::Is),
            E::FlowDestinationTranslated(compare) => {
                self.flow_bit(FLOW_STATUS, STATUS_DESTINATION_TRANSLATED, *compare);
            }
            E::Chance { below, of } => self.chance(*below, *of),
            E::Counter => self.other("counter", vec![]),
            E::SetMark(mark) => {
                self.immediate(Register::Reg1, &mark.to_ne_bytes());
                self.code.push(Expressions::Meta(vec![Meta::Key(MetaKey::Mark), Meta::SourceRegister(Register::Reg1)]));
            }
            E::SetOriginalZone(zone) => {
                self.immediate(Register::Reg1, &zone.to_ne_bytes());
                self.other("ct", vec![number(CT_KEY, FLOW_ZONE), register(CT_SREG, Register::Reg1), original()]);
            }
            E::Untracked => self.other("notrack", vec![]),
            E::SetTimeout(name) => {
                self.other("objref", vec![number(1, OBJECT_TIMEOUT), text(2, name)]);
            }
            E::Redirect(port) => {
                self.immediate(Register::Reg1, &port.to_be_bytes());
                self.other(
                    "redir",
                    vec![register(1, Register::Reg1), register(2, Register::Reg1), number(3, RANGE_HAS_PORT)],
                );
            }
            E::DnatPort(port) => self.dnat(None, Some(*port)),
            E::Dnat(SocketAddr::V4(to)) => self.dnat(Some(IpAddr::V4(*to.ip())), Some(to.port())),
            E::Dnat(SocketAddr::V6(to)) => self.dnat(Some(IpAddr::V6(*to.ip())), Some(to.port())),
            E::DnatAddress(to) => self.dnat(Some(*to), None),
            E::Masquerade => self.other("masq", vec![]),
            E::RejectWithReset => {
                const TCP_RESET: u32 = 1;
                self.require_protocol(L4Protocol::Tcp);
                self.other("reject", vec![number(1, TCP_RESET)]);
            }
            E::Accept => self.verdict(vec![VerdictAttribute::Code(Verdict::Other(1))]),
            E::Drop => self.verdict(vec![VerdictAttribute::Code(Verdict::Other(0))]),
            E::Return => self.verdict(vec![VerdictAttribute::Code(Verdict::Return)]),
            E::Jump(chain) => {
                self.verdict(vec![VerdictAttribute::Code(Verdict::Jump), VerdictAttribute::Chain(chain.clone())])
            }
        }
    }

    fn require_protocol(&mut self, protocol: L4Protocol) {
        if self.protocol == Some(protocol) {
            return;
        }
        self.protocol = Some(protocol);
        self.load_meta(MetaKey::L4Proto);
        let number = match protocol {
            L4Protocol::Tcp => TCP,
            L4Protocol::Udp => UDP,
        };
        self.compare(Compare::Is, &[number]);
    }

    fn require_family(&mut self, family: IpFamily) {
        if self.family == Some(family) {
            return;
        }
        self.family = Some(family);
        self.load_meta(MetaKey::Nfproto);
        self.compare(Compare::Is, &[family.number()]);
    }

    fn address(&mut self, compare: Compare, network: &IpNet, side: Side) {
        const NETWORK_HEADER: u32 = 1;
        let (family, bytes, offset) = match (network.trunc().addr(), side) {
            (IpAddr::V4(address), Side::Source) => (IpFamily::V4, address.octets().to_vec(), 12),
            (IpAddr::V4(address), Side::Destination) => (IpFamily::V4, address.octets().to_vec(), 16),
            (IpAddr::V6(address), Side::Source) => (IpFamily::V6, address.octets().to_vec(), 8),
            (IpAddr::V6(address), Side::Destination) => (IpFamily::V6, address.octets().to_vec(), 24),
        };
        self.require_family(family);
        let prefix = usize::from(network.prefix_len());
        // As `nft` does: of a prefix of whole bytes only those are loaded, of another all and a mask.
        let whole = prefix.is_multiple_of(8) && prefix > 0;
        let length = if whole { prefix / 8 } else { bytes.len() };
        self.payload(NETWORK_HEADER, offset, length as u32);
        if !whole {
            let mask: Vec<u8> = match network.netmask() {
                IpAddr::V4(mask) => mask.octets().to_vec(),
                IpAddr::V6(mask) => mask.octets().to_vec(),
            };
            self.mask(mask);
        }
        self.compare(compare, &bytes[..length]);
    }

    fn address_type(&mut self, compare: Compare, kind: AddressType, side: Side) {
        const DREG: u16 = 1;
        const RESULT: u16 = 2;
        const FLAGS: u16 = 3;
        const RESULT_TYPE: u32 = 3;
        let side = match side {
            Side::Source => 1,
            Side::Destination => 2,
        };
        self.other("fib", vec![register(DREG, Register::Reg1), number(RESULT, RESULT_TYPE), number(FLAGS, side)]);
        let kind = match kind {
            AddressType::Local => u32::from(libc::RTN_LOCAL),
        };
        self.compare(compare, &kind.to_ne_bytes());
    }

    /// Of the flags in `mask` the segment has these.
    fn flags(&mut self, mask: u8, flags: u8) {
        const FLAGS_OFFSET: u32 = 13;
        self.require_protocol(L4Protocol::Tcp);
        self.payload(TRANSPORT_HEADER, FLAGS_OFFSET, 1);
        self.mask(vec![mask]);
        self.compare(Compare::Is, &[flags]);
    }

    fn load_port(&mut self, offset: u32) {
        if self.protocol.is_none() {
            self.require_protocol(L4Protocol::Tcp);
        }
        self.payload(TRANSPORT_HEADER, offset, 2);
    }

    fn load_socket(&mut self, key: u32) {
        const KEY: u16 = 1;
        const DREG: u16 = 2;
        self.other("socket", vec![number(KEY, key), register(DREG, Register::Reg1)]);
    }

    fn has_socket(&mut self) {
        self.load_socket(SOCKET_TRANSPARENT);
        // Any value will do: the expression itself fails where there is no socket.
        self.compare_by(Operator::LessThanEqual, &[1]);
    }

    fn load_flow(&mut self, key: u32) {
        self.other("ct", vec![register(CT_DREG, Register::Reg1), number(CT_KEY, key)]);
    }

    fn flow_bit(&mut self, key: u32, bit: u32, compare: Compare) {
        self.load_flow(key);
        self.mask(bit.to_ne_bytes().to_vec());
        let set = match compare {
            Compare::Is => Compare::IsNot,
            Compare::IsNot => Compare::Is,
        };
        self.compare(set, &0u32.to_ne_bytes());
    }

    fn chance(&mut self, below: u32, of: u32) {
        const RANDOM: u32 = 1;
        const HTON: u32 = 1;
        let reg1 = |kind| register(kind, Register::Reg1);
        self.other("numgen", vec![reg1(1), number(2, of), number(3, RANDOM)]);
        // "Less than" compares bytes from the first on, so the number must be big endian.
        self.other("byteorder", vec![reg1(1), reg1(2), number(3, HTON), number(4, 4), number(5, 4)]);
        self.compare_by(Operator::LessThan, &below.to_be_bytes());
    }

    fn dnat(&mut self, address: Option<IpAddr>, port: Option<u16>) {
        const TYPE: u16 = 1;
        const FAMILY: u16 = 2;
        const ADDRESS_MIN: u16 = 3;
        const ADDRESS_MAX: u16 = 4;
        const PORT_MIN: u16 = 5;
        const PORT_MAX: u16 = 6;
        const FLAGS: u16 = 7;
        const DESTINATION: u32 = 1;
        const NFPROTO_INET: u32 = 1;
        let (family, bytes) = match address {
            None => (NFPROTO_INET, None),
            Some(IpAddr::V4(to)) => (IpFamily::V4.number().into(), Some(to.octets().to_vec())),
            Some(IpAddr::V6(to)) => (IpFamily::V6.number().into(), Some(to.octets().to_vec())),
        };
        let mut attributes = vec![number(TYPE, DESTINATION), number(FAMILY, family)];
        if let Some(bytes) = bytes {
            self.immediate(Register::Reg1, &bytes);
            attributes.push(register(ADDRESS_MIN, Register::Reg1));
            attributes.push(register(ADDRESS_MAX, Register::Reg1));
        }
        if let Some(port) = port {
            // Register 1 is 16 bytes wide: an IPv6 address fills it.
            let of_port = if address.is_some() { Register::Reg2 } else { Register::Reg1 };
            self.immediate(of_port, &port.to_be_bytes());
            attributes.push(register(PORT_MIN, of_port));
            attributes.push(register(PORT_MAX, of_port));
            attributes.push(number(FLAGS, RANGE_HAS_PORT));
        }
        self.other("nat", attributes);
    }

    fn load_meta(&mut self, key: MetaKey) {
        self.code.push(Expressions::Meta(vec![Meta::Key(key), Meta::DestinationRegister(Register::Reg1)]));
    }

    fn payload(&mut self, base: u32, offset: u32, length: u32) {
        self.code.push(Expressions::Payload(vec![
            Payload::DestinationRegister(Register::Reg1),
            Payload::Base(base),
            Payload::Offset(offset),
            Payload::Len(length),
        ]));
    }

    fn mask(&mut self, mask: Vec<u8>) {
        let zeros = vec![0; mask.len()];
        self.code.push(Expressions::Bitwise(vec![
            Bitwise::SourceRegister(Register::Reg1),
            Bitwise::DestinationRegister(Register::Reg1),
            Bitwise::Length(mask.len() as u32),
            Bitwise::Mask(DataAttribute::Value(mask)),
            Bitwise::Xor(DataAttribute::Value(zeros)),
        ]));
    }

    fn compare(&mut self, compare: Compare, value: &[u8]) {
        self.compare_by(
            match compare {
                Compare::Is => Operator::Equal,
                Compare::IsNot => Operator::NotEqual,
            },
            value,
        );
    }

    fn compare_by(&mut self, operator: Operator, value: &[u8]) {
        self.code.push(Expressions::Cmp(vec![
            Cmp::SourceRegister(Register::Reg1),
            Cmp::Op(operator),
            Cmp::Data(DataAttribute::Value(value.to_vec())),
        ]));
    }

    fn immediate(&mut self, to: Register, value: &[u8]) {
        self.code.push(Expressions::Immediate(vec![
            Immediate::DestinationRegister(to),
            Immediate::Data(DataAttribute::Value(value.to_vec())),
        ]));
    }

    fn verdict(&mut self, verdict: Vec<VerdictAttribute>) {
        self.code.push(Expressions::Immediate(vec![
            Immediate::DestinationRegister(Register::Verdict),
            Immediate::Data(DataAttribute::Verdict(verdict)),
        ]));
    }

    fn other(&mut self, name: &str, attributes: Vec<DefaultNla>) {
        self.code.push(Expressions::Other { expression_type: name.to_owned(), attributes });
    }
}

#[derive(Clone, Copy)]
enum Side {
    Source,
    Destination,
}

const TRANSPORT_HEADER: u32 = 2;
/// `enum nft_ct_keys`.
const FLOW_STATE: u32 = 0;
const FLOW_DIRECTION: u32 = 1;
const FLOW_STATUS: u32 = 2;
const FLOW_ZONE: u32 = 17;
/// Attributes of the expression `ct`.
const CT_DREG: u16 = 1;
const CT_KEY: u16 = 2;
const CT_DIRECTION: u16 = 3;
const CT_SREG: u16 = 4;

fn number(kind: u16, value: u32) -> DefaultNla {
    DefaultNla::new(kind, value.to_be_bytes().to_vec())
}

fn register(kind: u16, register: Register) -> DefaultNla {
    number(kind, register.into())
}

fn original() -> DefaultNla {
    DefaultNla::new(CT_DIRECTION, vec![Direction::Original as u8])
}

fn text(kind: u16, value: &str) -> DefaultNla {
    let mut bytes = value.as_bytes().to_vec();
    bytes.push(0);
    DefaultNla::new(kind, bytes)
}

fn nested(kind: u16, inner: &[DefaultNla]) -> DefaultNla {
    let mut bytes = vec![0; inner.buffer_len()];
    inner.emit(&mut bytes);
    DefaultNla::new(kind | NLA_F_NESTED, bytes)
}
