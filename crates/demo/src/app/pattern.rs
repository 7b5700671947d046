//! Bytes that both ends know: each depends on where it is, so that what is lost, doubled or moved is seen.

/// How many bytes are made, sent and compared at a time.
pub(super) const PIECE: usize = 64 * 1024;

/// The bytes from `offset` on, a multiple of 8.
pub(super) fn fill(offset: u64, bytes: &mut [u8]) {
    // An odd constant without a pattern of its own: the golden ratio.
    let words = (offset / 8..).map(|number| number.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes());
    for (piece, word) in bytes.chunks_mut(8).zip(words) {
        piece.copy_from_slice(&word[..piece.len()]);
    }
}

/// Where the first byte is that differs from those from `offset` on, a multiple of 8.
pub(super) fn first_difference(offset: u64, bytes: &[u8]) -> Option<u64> {
    let mut expected = vec![0; bytes.len()];
    fill(offset, &mut expected);
    if expected == bytes {
        return None;
    }
    let at = expected.iter().zip(bytes).position(|(expected, byte)| expected != byte)?;
    Some(offset + at as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_that_is_wrong_lost_or_moved_is_found_where_it_is() {
        let mut bytes = vec![0; 3 * PIECE + 5];
        fill(0, &mut bytes);
        assert_eq!(first_difference(0, &bytes), None);
        assert_eq!(first_difference(PIECE as u64, &bytes[PIECE..]), None);
        bytes[PIECE + 7] ^= 1;
        assert_eq!(first_difference(0, &bytes), Some(PIECE as u64 + 7));
        bytes[PIECE + 7] ^= 1;
        bytes.remove(100);
        assert!(first_difference(0, &bytes).is_some_and(|at| (100..116).contains(&at)));
    }
}
