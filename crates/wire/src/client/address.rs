//! Where the control plane is, as people and Kubernetes write it.

use std::net::{IpAddr, SocketAddr};

/// The port that the control plane serves nodes on, where none is said.
const PORT: u16 = 15012;

/// Reads `IP`, `IP:port` or `[IP]:port`. A Service's address comes without a port by Kubernetes' environment variables.
///
/// # Errors
/// One sentence that says what is accepted.
pub fn control_address(text: &str) -> Result<SocketAddr, String> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    if let Ok(address) = bare.parse::<IpAddr>() {
        return Ok(SocketAddr::new(address, PORT));
    }
    text.parse().map_err(|_| {
        format!("{text:?} is not the address of a control plane; write IP, IP:PORT or [IPv6]:PORT (the port is {PORT} unless said)")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_with_and_without_a_port() {
        for (text, address) in [
            ("10.0.0.1", "10.0.0.1:15012"),
            ("10.0.0.1:443", "10.0.0.1:443"),
            ("fd00::1", "[fd00::1]:15012"),
            ("[fd00::1]", "[fd00::1]:15012"),
            ("[fd00::1]:443", "[fd00::1]:443"),
        ] {
            assert_eq!(control_address(text), Ok(address.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn what_is_none_is_refused_with_what_to_write() {
        for text in ["", "control.example", "10.0.0.1:", "10.0.0.1:70000", "fd00::1:x", "[fd00::1"] {
            let sentence = control_address(text).unwrap_err();
            assert!(sentence.contains("write IP, IP:PORT"), "{sentence}");
        }
    }
}
