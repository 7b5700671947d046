//! Policy routing of the capture: what carries a mark is delivered in this namespace, whatever its
//! destination.
//!
//! The proxy connects to a pod's application in the name of the client, so the application's answers
//! are addressed to the client, somewhere else. `ip rule pref P fwmark M lookup T` and
//! `local default dev lo table T`, for both families, bring them to the proxy's socket instead. Without either the
//! connections hang.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::route::{RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::netlink::{Error, Socket};
use crate::nft::IpFamily;

/// The interface index of `lo`, in every network namespace.
const LOOPBACK: u32 = 1;

/// A mark, and the way of what carries it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LocalDelivery {
    /// The packets' mark, all 32 bits.
    pub mark: u32,
    /// The routing table, above 255 and used for nothing else.
    pub table: u32,
    /// The rule's place: 0 is the kernel's table of local addresses, 32766 the main table.
    pub preference: u32,
}

impl LocalDelivery {
    /// Makes route and rule be there, and no rule for another mark into the same table: one that knew that mark is gone, and took
    /// nothing away. What is there already stays.
    pub fn add(&self, socket: &mut Socket, family: IpFamily) -> Result<(), Error> {
        let what = format!("add the route {}", self.route_text(family));
        let route = RouteNetlinkMessage::NewRoute(self.route(family));
        socket.request(&what, route, NLM_F_CREATE | NLM_F_REPLACE)?;
        let marks = self.marks(socket, family)?;
        for mark in marks.iter().filter(|mark| **mark != self.mark) {
            Self { mark: *mark, ..*self }.remove_rule(socket, family)?;
        }
        if marks.contains(&self.mark) {
            return Ok(());
        }
        let what = format!("add the rule {}", self.rule_text(family));
        let rule = RouteNetlinkMessage::NewRule(self.rule(family));
        match socket.request(&what, rule, NLM_F_CREATE | NLM_F_EXCL) {
            Err(error) if error.errno() == Some(libc::EEXIST) => Ok(()),
            other => other,
        }
    }

    /// What is missing, as `ip` would say it; `None` when route and rule are there.
    pub fn missing(&self, socket: &mut Socket, family: IpFamily) -> Result<Option<String>, Error> {
        if !self.marks(socket, family)?.contains(&self.mark) {
            return Ok(Some(format!("the rule {} is missing", self.rule_text(family))));
        }
        if !self.has_route(socket, family)? {
            return Ok(Some(format!("the route {} is missing", self.route_text(family))));
        }
        Ok(None)
    }

    /// Takes rules and route away; what is not there is fine. Only when no connection uses them.
    pub fn remove(&self, socket: &mut Socket, family: IpFamily) -> Result<(), Error> {
        for mark in self.marks(socket, family)? {
            Self { mark, ..*self }.remove_rule(socket, family)?;
        }
        let what = format!("delete the route {}", self.route_text(family));
        or_gone(socket.request(&what, RouteNetlinkMessage::DelRoute(self.route(family)), 0))
    }

    fn remove_rule(&self, socket: &mut Socket, family: IpFamily) -> Result<(), Error> {
        let what = format!("delete the rule {}", self.rule_text(family));
        or_gone(socket.request(&what, RouteNetlinkMessage::DelRule(self.rule(family)), 0))
    }

    fn rule(&self, family: IpFamily) -> RuleMessage {
        let mut rule = RuleMessage::default();
        rule.header.family = address_family(family);
        rule.header.action = RuleAction::ToTable;
        rule.attributes = vec![
            RuleAttribute::Priority(self.preference),
            RuleAttribute::FwMark(self.mark),
            RuleAttribute::FwMask(u32::MAX),
            RuleAttribute::Table(self.table),
        ];
        rule
    }

    fn route(&self, family: IpFamily) -> RouteMessage {
        let mut route = RouteMessage::default();
        route.header.address_family = address_family(family);
        route.header.kind = RouteType::Local;
        route.header.scope = RouteScope::Host;
        route.header.protocol = RouteProtocol::Static;
        route.attributes = vec![
            RouteAttribute::Table(self.table),
            RouteAttribute::Oif(LOOPBACK),
            RouteAttribute::Destination(everywhere(family).into()),
        ];
        route
    }

    /// The marks of all rules that are as this one, but for the mark.
    fn marks(&self, socket: &mut Socket, family: IpFamily) -> Result<Vec<u32>, Error> {
        let mut question = RuleMessage::default();
        question.header.family = address_family(family);
        let rules = socket.dump("read the rules", RouteNetlinkMessage::GetRule(question))?;
        Ok(rules
            .iter()
            .filter_map(|answer| match answer {
                RouteNetlinkMessage::NewRule(rule) => self.mark_of(rule, family),
                _ => None,
            })
            .collect())
    }

    /// The mark of a rule that is ours but for that. One with one selector more would deliver less, and is not.
    fn mark_of(&self, rule: &RuleMessage, family: IpFamily) -> Option<u32> {
        let header = &rule.header;
        let (mut mark, mut mask, mut preference) = (0, u32::MAX, 0);
        let mut table = u32::from(header.table);
        let mut others =
            header.flags.contains(RuleFlags::Invert) || header.dst_len != 0 || header.src_len != 0 || header.tos != 0;
        for attribute in &rule.attributes {
            match attribute {
                RuleAttribute::FwMark(it) => mark = *it,
                RuleAttribute::FwMask(it) => mask = *it,
                RuleAttribute::Priority(it) => preference = *it,
                RuleAttribute::Table(it) => table = *it,
                // These say nothing of which packets the rule is for.
                RuleAttribute::Protocol(_)
                | RuleAttribute::SuppressPrefixLen(u32::MAX)
                | RuleAttribute::SuppressIfGroup(u32::MAX) => {}
                _ => others = true,
            }
        }
        let is_ours = header.family == address_family(family)
            && header.action == RuleAction::ToTable
            && (mask, preference, table) == (u32::MAX, self.preference, self.table)
            && !others;
        is_ours.then_some(mark)
    }

    fn has_route(&self, socket: &mut Socket, family: IpFamily) -> Result<bool, Error> {
        let mut question = RouteMessage::default();
        question.header.address_family = address_family(family);
        question.attributes = vec![RouteAttribute::Table(self.table)];
        let question = RouteNetlinkMessage::GetRoute(question);
        let routes = match socket.dump_filtered("read the routes", question) {
            // IPv6 says so of a table that nobody has used yet.
            Err(error) if error.errno() == Some(libc::ENOENT) => return Ok(false),
            other => other?,
        };
        Ok(routes.iter().any(|answer| match answer {
            RouteNetlinkMessage::NewRoute(route) => {
                let of = |wanted: &RouteAttribute| route.attributes.contains(wanted);
                route.header.kind == RouteType::Local
                    && route.header.address_family == address_family(family)
                    && route.header.destination_prefix_length == 0
                    && route.header.source_prefix_length == 0
                    && of(&RouteAttribute::Table(self.table))
                    && of(&RouteAttribute::Oif(LOOPBACK))
            }
            _ => false,
        }))
    }

    fn rule_text(&self, family: IpFamily) -> impl fmt::Display {
        let LocalDelivery { mark, table, preference } = self;
        format!("ip {} rule pref {preference} fwmark {mark:#x} lookup {table}", option(family))
    }

    fn route_text(&self, family: IpFamily) -> impl fmt::Display {
        format!("ip {} route local default dev lo table {}", option(family), self.table)
    }
}

fn option(family: IpFamily) -> &'static str {
    match family {
        IpFamily::V4 => "-4",
        IpFamily::V6 => "-6",
    }
}

/// What is to be taken away and is not there is fine.
fn or_gone(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::ESRCH)) => Ok(()),
        other => other,
    }
}

fn everywhere(family: IpFamily) -> IpAddr {
    match family {
        IpFamily::V4 => Ipv4Addr::UNSPECIFIED.into(),
        IpFamily::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

fn address_family(family: IpFamily) -> AddressFamily {
    match family {
        IpFamily::V4 => AddressFamily::Inet,
        IpFamily::V6 => AddressFamily::Inet6,
    }
}
