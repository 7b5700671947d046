//! The secrets of a connection's two directions, from which the successors of its keys are derived (RFC 8446, section 7.2).
//!
//! rustls gives keys of a finished handshake away, and keeps what their successors are derived from in an object of two
//! kilobytes, with the other side's certificates. A connection that rests for a year needs 48 bytes of it for each
//! direction: rustls names the secrets to a [`KeyLog`], which is here one object for one handshake, and logs nothing.

use std::fmt;
use std::sync::{Arc, OnceLock};

use rustls::crypto::tls13::{Hkdf, HkdfExpander, OkmBlock};
use rustls::{ClientConfig, KeyLog, ServerConfig, SupportedCipherSuite};

use super::aead::{Key, Material};

/// The traffic secrets of one handshake, once it is over.
#[derive(Default)]
pub struct Secrets {
    client: OnceLock<OkmBlock>,
    server: OnceLock<OkmBlock>,
}

impl fmt::Debug for Secrets {
    /// Without what it is for.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secrets")
    }
}

impl Secrets {
    /// `config` for one connection alone, and where its secrets will be.
    pub fn of_client(config: &ClientConfig) -> (Arc<ClientConfig>, Arc<Self>) {
        let secrets = Arc::<Self>::default();
        let mut config = config.clone();
        config.key_log = secrets.clone();
        (Arc::new(config), secrets)
    }

    /// The same for the side that was connected to.
    pub fn of_server(config: &ServerConfig) -> (Arc<ServerConfig>, Arc<Self>) {
        let secrets = Arc::<Self>::default();
        let mut config = config.clone();
        config.key_log = secrets.clone();
        (Arc::new(config), secrets)
    }

    /// What the client's keys and the server's are derived from; `None` before the handshake is over.
    pub(super) fn successors(&self, suite: SupportedCipherSuite) -> Option<(Successor, Successor)> {
        let hkdf = suite.tls13()?.hkdf_provider;
        let successor = |secret: &OnceLock<OkmBlock>| Some(Successor { secret: secret.get()?.clone(), hkdf });
        Some((successor(&self.client)?, successor(&self.server)?))
    }

    fn place(&self, label: &str) -> Option<&OnceLock<OkmBlock>> {
        match label {
            "CLIENT_TRAFFIC_SECRET_0" => Some(&self.client),
            "SERVER_TRAFFIC_SECRET_0" => Some(&self.server),
            _ => None,
        }
    }
}

impl KeyLog for Secrets {
    fn log(&self, label: &str, _: &[u8], secret: &[u8]) {
        if let Some(place) = self.place(label) {
            // There is one of each in a handshake.
            let _ = place.set(OkmBlock::new(secret));
        }
    }

    fn will_log(&self, label: &str) -> bool {
        self.place(label).is_some()
    }
}

/// The traffic secret of one direction, as it is now.
pub(super) struct Successor {
    secret: OkmBlock,
    hkdf: &'static dyn Hkdf,
}

impl fmt::Debug for Successor {
    /// Without the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Successor")
    }
}

impl Successor {
    /// The key that follows this one.
    pub(super) fn of(&mut self, key: &Key) -> Key {
        let expander = self.hkdf.expander_for_okm(&self.secret);
        let mut secret = [0; OkmBlock::MAX_LEN];
        let length = expander.hash_len();
        expand(&*expander, b"traffic upd", &mut secret[..length]);
        self.secret = OkmBlock::new(&secret[..length]);
        zeroize::Zeroize::zeroize(&mut secret);
        let expander = self.hkdf.expander_for_okm(&self.secret);
        let mut material = Material::empty(key.algorithm());
        expand(&*expander, b"key", material.key_mut());
        expand(&*expander, b"iv", &mut material.iv);
        Key::new(0, material)
    }
}

/// `HKDF-Expand-Label` with an empty context (RFC 8446, section 7.1).
fn expand(expander: &dyn HkdfExpander, label: &[u8], output: &mut [u8]) {
    const PREFIX: &[u8] = b"tls13 ";
    const SHORT: &str = "labels and keys are short";
    let length = u16::try_from(output.len()).expect(SHORT).to_be_bytes();
    let label_length = u8::try_from(PREFIX.len() + label.len()).expect(SHORT);
    expander.expand_slice(&[&length, &[label_length], PREFIX, label, &[0]], output).expect(SHORT);
}
