//! PEM as text: the textual encoding of certificates and keys (RFC 7468).

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use zeroize::Zeroizing;

/// The label of a certificate (RFC 7468, section 5.1).
pub(crate) const CERTIFICATE: &str = "CERTIFICATE";
/// The label of a PKCS #10 certificate request (RFC 7468, section 7).
pub(crate) const CERTIFICATE_REQUEST: &str = "CERTIFICATE REQUEST";
/// The label of an unencrypted PKCS #8 private key (RFC 7468, section 10).
pub(crate) const PRIVATE_KEY: &str = "PRIVATE KEY";

/// Characters in a line of base64 (RFC 7468, section 2: generators wrap at exactly 64).
const LINE: usize = 64;

/// Encodes one object. The text is wiped when dropped, for it may be a key; whoever publishes it takes a copy.
pub(crate) fn encode(label: &str, der: &[u8]) -> Zeroizing<String> {
    // Both buffers have their final size from the start: a buffer that grows leaves a copy behind that nobody wipes.
    let mut body = Zeroizing::new(String::with_capacity(der.len().div_ceil(3) * 4));
    STANDARD.encode_string(der, &mut body);
    let capacity = body.len() + body.len().div_ceil(LINE) + 2 * (label.len() + 20);
    let mut text = Zeroizing::new(String::with_capacity(capacity));
    text.push_str("-----BEGIN ");
    text.push_str(label);
    text.push_str("-----\n");
    let mut rest = body.as_str();
    while !rest.is_empty() {
        let (line, tail) = rest.split_at(rest.len().min(LINE));
        text.push_str(line);
        text.push('\n');
        rest = tail;
    }
    text.push_str("-----END ");
    text.push_str(label);
    text.push_str("-----\n");
    text
}

/// Encodes certificates one after the other.
pub(crate) fn encode_certificates<'a>(certificates: impl IntoIterator<Item = &'a CertificateDer<'static>>) -> String {
    certificates.into_iter().map(|der| encode(CERTIFICATE, der).to_string()).collect()
}

/// Decodes the certificates in `text`; what is outside of their boundaries is commentary (RFC 7468, section 2).
///
/// `None` where a section is broken. The caller bounds the text, which bounds what is read from it.
pub(crate) fn decode_certificates(text: &str) -> Option<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_slice_iter(text.as_bytes()).collect::<Result<_, _>>().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_encoded_is_decoded_again_for_every_length_of_padding_and_line() {
        for length in [0, 1, 2, 3, 47, 48, 49, 96, 1000] {
            let certificates = vec![CertificateDer::from(vec![0xa5; length]), CertificateDer::from(vec![1, 2, 3])];
            let text = encode_certificates(&certificates);
            assert_eq!(decode_certificates(&text), Some(certificates));
            assert!(text.lines().all(|line| line.len() <= LINE));
        }
    }

    #[test]
    fn a_broken_section_is_not_skipped() {
        let text = "-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n";
        assert_eq!(decode_certificates(text), None);
    }
}
