//! One direction's key, its nonces (RFC 8446, section 5.3), and the cipher by what this processor is best at.

use std::fmt;
use std::sync::LazyLock;

use rustls::ConnectionTrafficSecrets as Secrets;

use super::{AFTER, APPLICATION_DATA, BEFORE, MAX_CONTENT, TAG};

const NONCE: usize = 12;

/// A key, and how many records it has sealed or opened.
pub(super) struct Key {
    cipher: Cipher,
    iv: [u8; NONCE],
    sequence: u64,
}

/// Two libraries with one interface. AWS-LC is what everything else here uses; ring has code for processors with VAES and
/// without AVX-512 (AMD's Zen 3, for one) that takes half of the time.
enum Cipher {
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
    fn new(secrets: &Secrets, ring: bool) -> (Self, [u8; NONCE]) {
        use {aws_lc_rs::aead as aws, ring::aead as ring_aead};
        let (aws_algorithm, ring_algorithm, key, iv) = match secrets {
            Secrets::Aes128Gcm { key, iv } => (&aws::AES_128_GCM, &ring_aead::AES_128_GCM, key, iv),
            Secrets::Aes256Gcm { key, iv } => (&aws::AES_256_GCM, &ring_aead::AES_256_GCM, key, iv),
            Secrets::Chacha20Poly1305 { key, iv } => (&aws::CHACHA20_POLY1305, &ring_aead::CHACHA20_POLY1305, key, iv),
            // The enum may grow with suites that our provider does not offer.
            _ => unreachable!("a cipher suite that was not offered"),
        };
        const LENGTH: &str = "rustls gives a key of the suite's own length";
        let iv = iv.as_ref().try_into().expect(LENGTH);
        let cipher = if ring {
            let key = ring_aead::UnboundKey::new(ring_algorithm, key.as_ref()).expect(LENGTH);
            Self::Ring(Box::new(ring_aead::LessSafeKey::new(key)))
        } else {
            let key = aws::UnboundKey::new(aws_algorithm, key.as_ref()).expect(LENGTH);
            Self::AwsLc(aws::LessSafeKey::new(key))
        };
        (cipher, iv)
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
    pub(super) fn new(sequence: u64, secrets: &Secrets) -> Self {
        Self::with(sequence, secrets, *RING)
    }

    /// The same by one of the two libraries.
    pub(super) fn with(sequence: u64, secrets: &Secrets, ring: bool) -> Self {
        let (cipher, iv) = Cipher::new(secrets, ring);
        Self { cipher, iv, sequence }
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
        tag.copy_from_slice(&self.cipher.seal(nonce, header, plain));
    }

    /// Opens a whole record in place; `None` where its seal is broken.
    pub(super) fn open<'r>(&mut self, record: &'r mut [u8]) -> Option<&'r [u8]> {
        let (header, sealed) = record.split_first_chunk_mut::<BEFORE>()?;
        let nonce = self.nonce();
        self.cipher.open(nonce, *header, sealed)
    }

    fn nonce(&mut self) -> [u8; NONCE] {
        let mut nonce = self.iv;
        for (byte, sequence) in nonce[NONCE - 8..].iter_mut().zip(self.sequence.to_be_bytes()) {
            *byte ^= sequence;
        }
        // A key update comes long before; were it not to, a repeated nonce would be the end of secrecy.
        self.sequence = self.sequence.checked_add(1).expect("no key is used 2^64 times");
        nonce
    }
}

/// The header of a record with so many bytes behind it. On the outside each is application data of TLS 1.2.
fn header(length: usize) -> [u8; BEFORE] {
    // At most 2^14 + 17.
    let [high, low] = (length as u16).to_be_bytes();
    [APPLICATION_DATA, 3, 3, high, low]
}
