//! One direction's key, its nonces (RFC 8446, section 5.3), and the cipher by what this processor is best at.

use std::fmt;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustls::ConnectionTrafficSecrets;
use zeroize::Zeroizing;

use super::{AFTER, APPLICATION_DATA, BEFORE, MAX_CONTENT, TAG, ciphers};

const NONCE: usize = 12;

/// The most bytes of a key, of all algorithms.
const LONGEST_KEY: usize = 32;

/// A key, and how many records it has sealed or opened. It is a hundred bytes; the cipher that is made of it is six times that,
/// and with the core that it was last used on ([`ciphers`]).
pub(super) struct Key {
    material: Material,
    sequence: u64,
    /// Whose cipher is whose. Never given twice.
    id: u64,
    /// Which library makes the cipher.
    ring: bool,
}

/// What a cipher is made of.
pub(super) struct Material {
    algorithm: Algorithm,
    key: Zeroizing<[u8; LONGEST_KEY]>,
    pub(super) iv: [u8; NONCE],
}

/// The AEAD of a suite.
#[derive(Clone, Copy)]
pub(super) enum Algorithm {
    Aes128Gcm,
    Aes256Gcm,
    Chacha20Poly1305,
}

impl Algorithm {
    /// Bytes of its key.
    fn key_length(self) -> usize {
        match self {
            Self::Aes128Gcm => 16,
            Self::Aes256Gcm | Self::Chacha20Poly1305 => LONGEST_KEY,
        }
    }
}

impl Material {
    /// All zeroes, to be filled.
    pub(super) fn empty(algorithm: Algorithm) -> Self {
        Self { algorithm, key: Zeroizing::new([0; LONGEST_KEY]), iv: [0; NONCE] }
    }

    fn key(&self) -> &[u8] {
        &self.key[..self.algorithm.key_length()]
    }

    /// The bytes of the key.
    pub(super) fn key_mut(&mut self) -> &mut [u8] {
        &mut self.key[..self.algorithm.key_length()]
    }
}

impl From<&ConnectionTrafficSecrets> for Material {
    fn from(secrets: &ConnectionTrafficSecrets) -> Self {
        use ConnectionTrafficSecrets::{Aes128Gcm, Aes256Gcm, Chacha20Poly1305};
        let (algorithm, key, iv) = match secrets {
            Aes128Gcm { key, iv } => (Algorithm::Aes128Gcm, key, iv),
            Aes256Gcm { key, iv } => (Algorithm::Aes256Gcm, key, iv),
            Chacha20Poly1305 { key, iv } => (Algorithm::Chacha20Poly1305, key, iv),
            // The enum may grow with suites that our provider does not offer.
            _ => unreachable!("a cipher suite that was not offered"),
        };
        let mut material = Self::empty(algorithm);
        // rustls gives a key of the suite's own length.
        material.key_mut().copy_from_slice(key.as_ref());
        material.iv.copy_from_slice(iv.as_ref());
        material
    }
}

/// Two libraries with one interface. AWS-LC is what everything else here uses; ring has code for processors with VAES and
/// without AVX-512 (AMD's Zen 3, for one) that takes half of the time.
pub(super) enum Cipher {
    AwsLc(aws_lc_rs::aead::LessSafeKey),
    Ring(Box<ring::aead::LessSafeKey>),
}

impl fmt::Debug for Key {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key").field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

/// Whether ring's AES-GCM is the faster one here.
#[cfg(target_arch = "x86_64")]
static RING: LazyLock<bool> = LazyLock::new(|| {
    let has_vaes = std::arch::is_x86_feature_detected!("vaes") && std::arch::is_x86_feature_detected!("vpclmulqdq");
    has_vaes && std::arch::is_x86_feature_detected!("avx2") && !std::arch::is_x86_feature_detected!("avx512bw")
});

/// Whether ring's AES-GCM is the faster one here.
#[cfg(not(target_arch = "x86_64"))]
static RING: LazyLock<bool> = LazyLock::new(|| false);

impl Cipher {
    fn new(material: &Material, ring: bool) -> Self {
        use {aws_lc_rs::aead as aws, ring::aead as ring_aead};
        let (aws_algorithm, ring_algorithm) = match material.algorithm {
            Algorithm::Aes128Gcm => (&aws::AES_128_GCM, &ring_aead::AES_128_GCM),
            Algorithm::Aes256Gcm => (&aws::AES_256_GCM, &ring_aead::AES_256_GCM),
            Algorithm::Chacha20Poly1305 => (&aws::CHACHA20_POLY1305, &ring_aead::CHACHA20_POLY1305),
        };
        const LENGTH: &str = "material has a key of its algorithm's own length";
        if ring {
            let key = ring_aead::UnboundKey::new(ring_algorithm, material.key()).expect(LENGTH);
            Self::Ring(Box::new(ring_aead::LessSafeKey::new(key)))
        } else {
            let key = aws::UnboundKey::new(aws_algorithm, material.key()).expect(LENGTH);
            Self::AwsLc(aws::LessSafeKey::new(key))
        }
    }

    /// Encrypts `content` where it lies and returns its tag.
    fn seal(&self, nonce: [u8; NONCE], header: [u8; BEFORE], content: &mut [u8]) -> [u8; TAG] {
        // They fail for lengths beyond 2^36 bytes alone.
        const LENGTH: &str = "a record is short enough to be sealed";
        let mut tag = [0; TAG];
        match self {
            Self::AwsLc(key) => {
                use aws_lc_rs::aead::{Aad, Nonce};
                let nonce = Nonce::assume_unique_for_key(nonce);
                let sealed = key.seal_in_place_separate_tag(nonce, Aad::from(header), content).expect(LENGTH);
                tag.copy_from_slice(sealed.as_ref());
            }
            Self::Ring(key) => {
                use ring::aead::{Aad, Nonce};
                let nonce = Nonce::assume_unique_for_key(nonce);
                let sealed = key.seal_in_place_separate_tag(nonce, Aad::from(header), content).expect(LENGTH);
                tag.copy_from_slice(sealed.as_ref());
            }
        }
        tag
    }

    /// Decrypts `content` and its tag where they lie; `None` where the tag is not its own.
    fn open<'c>(&self, nonce: [u8; NONCE], header: [u8; BEFORE], content: &'c mut [u8]) -> Option<&'c [u8]> {
        match self {
            Self::AwsLc(key) => {
                use aws_lc_rs::aead::{Aad, Nonce};
                key.open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(header), content).ok().map(|it| &*it)
            }
            Self::Ring(key) => {
                use ring::aead::{Aad, Nonce};
                key.open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(header), content).ok().map(|it| &*it)
            }
        }
    }
}

impl Key {
    /// A key of which `sequence` records were used already.
    pub(super) fn new(sequence: u64, material: Material) -> Self {
        Self::with(sequence, material, *RING)
    }

    /// The same by one of the two libraries.
    pub(super) fn with(sequence: u64, material: Material, ring: bool) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { material, sequence, id: NEXT.fetch_add(1, Ordering::Relaxed), ring }
    }

    /// What it is a key of.
    pub(super) fn algorithm(&self) -> Algorithm {
        self.material.algorithm
    }

    /// Does something with the cipher of this key.
    fn with_cipher<T>(&self, work: impl FnOnce(&Cipher) -> T) -> T {
        ciphers::with(self.id, || Cipher::new(&self.material, self.ring), work)
    }

    /// How many records it was used for.
    pub(super) fn used(&self) -> u64 {
        self.sequence
    }

    /// As if it had been used so often.
    #[cfg(test)]
    pub(super) fn skip_to(&mut self, sequence: u64) {
        self.sequence = sequence;
    }

    /// Seals a record in place, as `Sealer::seal` describes it.
    pub(super) fn seal(&mut self, kind: u8, record: &mut [u8]) {
        let content = record.len().saturating_sub(BEFORE + AFTER);
        assert!((1..=MAX_CONTENT).contains(&content), "a record of {content} bytes");
        let header = header(record.len() - BEFORE);
        record[..BEFORE].copy_from_slice(&header);
        record[BEFORE + content] = kind;
        let (plain, tag) = record[BEFORE..].split_at_mut(content + 1);
        let nonce = self.nonce();
        tag.copy_from_slice(&self.with_cipher(|cipher| cipher.seal(nonce, header, plain)));
    }

    /// Opens a whole record in place; `None` where its seal is broken.
    pub(super) fn open<'r>(&mut self, record: &'r mut [u8]) -> Option<&'r [u8]> {
        let (header, sealed) = record.split_first_chunk_mut::<BEFORE>()?;
        let nonce = self.nonce();
        self.with_cipher(|cipher| cipher.open(nonce, *header, sealed))
    }

    fn nonce(&mut self) -> [u8; NONCE] {
        let mut nonce = self.material.iv;
        for (byte, sequence) in nonce[NONCE - 8..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= sequence;
        }
        // A key update comes long before; were it not to, a repeated nonce would be the end of secrecy.
        self.sequence = self.sequence.checked_add(1).expect("no key is used 2^64 times");
        nonce
    }
}

impl Drop for Key {
    fn drop(&mut self) {
        ciphers::forget(self.id);
    }
}

/// The header of a record with so many bytes behind it. On the outside each is application data of TLS 1.2.
fn header(length: usize) -> [u8; BEFORE] {
    // At most 2^14 + 17.
    let [high, low] = (length as u16).to_be_bytes();
    [APPLICATION_DATA, 3, 3, high, low]
}
