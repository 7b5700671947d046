//! Reading what the box shows: addresses, and JSON without ceremony.

use std::net::IpAddr;

use serde_json::Value;

/// The two families, for tests that run over both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const BOTH: [Family; 2] = [Family::V4, Family::V6];

    /// Whether an address is of this family.
    #[must_use]
    pub fn has(self, address: IpAddr) -> bool {
        match self {
            Family::V4 => address.is_ipv4(),
            Family::V6 => address.is_ipv6(),
        }
    }

    /// An address of this family among `addresses`, a JSON list of strings.
    #[track_caller]
    pub(crate) fn of(self, addresses: &Value) -> IpAddr {
        let all = addresses.as_array().into_iter().flatten().filter_map(|address| address.as_str()?.parse().ok());
        let mut mine = all.filter(|address| self.has(*address));
        mine.next().unwrap_or_else(|| panic!("no {self:?} address in {addresses}"))
    }
}

/// A field's text; empty when there is none.
#[must_use]
pub fn text<'a>(value: &'a Value, field: &str) -> &'a str {
    value[field].as_str().unwrap_or_default()
}
