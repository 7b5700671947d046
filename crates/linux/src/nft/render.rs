//! A table in the language of the `nft` program.

use std::fmt::{self, Display, Formatter};
use std::net::IpAddr;

use ipnet::IpNet;

use super::expression::{AddressType, Compare, Direction, Expression, L4Protocol, Rule};
use super::{Chain, IpFamily, PortSet, Table, Timeout};

impl Display for Table {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "table inet {} {{", self.name)?;
        for timeout in &self.timeouts {
            write!(f, "{timeout}")?;
        }
        for set in &self.sets {
            write!(f, "{set}")?;
        }
        for chain in &self.chains {
            write!(f, "{chain}")?;
        }
        writeln!(f, "}}")
    }
}

impl Display for Timeout {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let family = match self.family {
            IpFamily::V4 => "ip",
            IpFamily::V6 => "ip6",
        };
        writeln!(f, "\tct timeout {} {{", self.name)?;
        writeln!(f, "\t\tprotocol tcp;")?;
        writeln!(f, "\t\tl3proto {family};")?;
        let (fin, close) = (self.fin_wait, self.close_wait);
        writeln!(f, "\t\tpolicy = {{ fin_wait : {fin}, close_wait : {close} }}")?;
        writeln!(f, "\t}}")
    }
}

impl Display for PortSet {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "\tset {} {{", self.name)?;
        writeln!(f, "\t\ttype inet_service")?;
        if !self.ports.is_empty() {
            let ports: Vec<String> = self.ports.iter().map(u16::to_string).collect();
            writeln!(f, "\t\telements = {{ {} }}", ports.join(", "))?;
        }
        writeln!(f, "\t}}")
    }
}

impl Display for Chain {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        writeln!(f, "\tchain {} {{", self.name)?;
        if let Some(hook) = &self.hook {
            let (kind, point) = (hook.kind.as_str(), hook.point.as_str());
            let (priority, policy) = (hook.priority, hook.policy.as_str());
            writeln!(f, "\t\ttype {kind} hook {point} priority {priority}; policy {policy};")?;
        }
        for rule in &self.rules {
            writeln!(f, "\t\t{rule}")?;
        }
        writeln!(f, "\t}}")
    }
}

impl Display for Rule {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let mut protocol = L4Protocol::Tcp;
        for (index, expression) in self.expressions.iter().enumerate() {
            if index > 0 {
                f.write_str(" ")?;
            }
            if let Expression::Protocol(it) = expression {
                protocol = *it;
            }
            expression_text(f, expression, protocol)?;
        }
        if !self.why.is_empty() {
            write!(f, " comment \"{}\"", self.why)?;
        }
        Ok(())
    }
}

fn expression_text(f: &mut Formatter<'_>, expression: &Expression, protocol: L4Protocol) -> fmt::Result {
    use Expression as E;
    let protocol = protocol_text(protocol);
    match expression {
        E::Mark(compare, mark) => write!(f, "meta mark {}{mark:#010x}", not(*compare)),
        E::FromLoopback(compare) => write!(f, "iif {}\"lo\"", not(*compare)),
        E::Forwarded => f.write_str("iif != 0"),
        E::Family(IpFamily::V4) => f.write_str("meta nfproto ipv4"),
        E::Family(IpFamily::V6) => f.write_str("meta nfproto ipv6"),
        E::Protocol(protocol) => write!(f, "meta l4proto {}", protocol_text(*protocol)),
        E::Source(compare, net) => write!(f, "{} saddr {}{net}", family(net), not(*compare)),
        E::Destination(compare, net) => write!(f, "{} daddr {}{net}", family(net), not(*compare)),
        E::SourceType(compare, AddressType::Local) => {
            write!(f, "fib saddr type {}local", not(*compare))
        }
        E::DestinationType(compare, AddressType::Local) => {
            write!(f, "fib daddr type {}local", not(*compare))
        }
        E::TcpSyn => f.write_str("tcp flags & (fin | syn | rst | ack) == syn"),
        E::TcpReset => f.write_str("tcp flags & rst == rst"),
        E::SourcePort(compare, port) => write!(f, "{protocol} sport {}{port}", not(*compare)),
        E::DestinationPort(compare, port) => write!(f, "{protocol} dport {}{port}", not(*compare)),
        E::DestinationPortIn(set) => write!(f, "{protocol} dport @{set}"),
        E::HasSocket => f.write_str("socket transparent <= 1"),
        E::SocketMark(compare, mark) => write!(f, "socket mark {}{mark:#010x}", not(*compare)),
        E::OriginalZone(compare, zone) => write!(f, "ct original zone {}{zone}", not(*compare)),
        E::FlowDirection(Direction::Original) => f.write_str("ct direction original"),
        E::FlowDirection(Direction::Reply) => f.write_str("ct direction reply"),
        E::FlowInvalid => f.write_str("ct state invalid"),
        E::FlowDestinationTranslated(Compare::Is) => f.write_str("ct status dnat"),
        E::FlowDestinationTranslated(Compare::IsNot) => f.write_str("ct status & dnat == 0"),
        E::Chance { below, of } => write!(f, "numgen random mod {of} < {below}"),
        E::Counter => f.write_str("counter"),
        E::SetMark(mark) => write!(f, "meta mark set {mark:#010x}"),
        E::SetOriginalZone(zone) => write!(f, "ct original zone set {zone}"),
        E::Untracked => f.write_str("notrack"),
        E::SetTimeout(name) => write!(f, "ct timeout set \"{name}\""),
        E::Redirect(port) => write!(f, "redirect to :{port}"),
        E::DnatPort(port) => write!(f, "dnat to :{port}"),
        E::Dnat(to) => write!(f, "dnat {} to {to}", address_family(to.ip())),
        E::DnatAddress(to) => write!(f, "dnat {} to {to}", address_family(*to)),
        E::Masquerade => f.write_str("masquerade"),
        E::RejectWithReset => f.write_str("reject with tcp reset"),
        E::Accept => f.write_str("accept"),
        E::Drop => f.write_str("drop"),
        E::Return => f.write_str("return"),
        E::Jump(chain) => write!(f, "jump {chain}"),
    }
}

fn not(compare: Compare) -> &'static str {
    match compare {
        Compare::Is => "",
        Compare::IsNot => "!= ",
    }
}

fn protocol_text(protocol: L4Protocol) -> &'static str {
    match protocol {
        L4Protocol::Tcp => "tcp",
        L4Protocol::Udp => "udp",
    }
}

fn family(network: &IpNet) -> &'static str {
    address_family(network.addr())
}

fn address_family(address: IpAddr) -> &'static str {
    match address {
        IpAddr::V4(_) => "ip",
        IpAddr::V6(_) => "ip6",
    }
}
