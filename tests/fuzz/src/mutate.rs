//! Cheap changes to known inputs, from a fixed seed: what libFuzzer does without its instrumentation, and the same each time.

/// A pseudo-random number generator (xorshift64*): no secret hangs on it.
#[derive(Clone, Debug)]
pub struct Dice(u64);

impl Dice {
    /// One that always rolls the same.
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// A number below `bound`, which is above 0.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let number = self.0.wrapping_mul(0x2545_F491_4F6C_DD1D);
        usize::try_from(number >> 33).unwrap_or(0) % bound
    }
}

/// Longer than any bound that is looked at is worth crossing.
const LONGEST: usize = 70_000;

/// Bytes at which lengths, tags and numbers like to go wrong.
const INTERESTING: &[u8] =
    &[0, 1, 2, 0x0a, 0x12, 0x16, 0x20, 0x7f, 0x80, 0xfe, 0xff, b'-', b':', b'\n', b'&', b'*', b'{'];

/// A new input: one of `known` with one to eight changes, perhaps crossed with another.
pub fn mutated(known: &[Vec<u8>], dice: &mut Dice) -> Vec<u8> {
    let mut bytes = known[dice.below(known.len())].clone();
    for _ in 0..1 + dice.below(8) {
        let place = dice.below(bytes.len() + 1);
        let bits = dice.below(8);
        let length = 1 + dice.below(1 << bits);
        let end = (place + length).min(bytes.len());
        match dice.below(9) {
            0 if place < bytes.len() => bytes[place] ^= 1 << dice.below(8),
            1 if place < bytes.len() => bytes[place] = INTERESTING[dice.below(INTERESTING.len())],
            2 if place < bytes.len() => bytes[place] = bytes[place].wrapping_add(1).wrapping_sub(2 * (place as u8 & 1)),
            3 => drop(bytes.drain(place..end)),
            4 => {
                let copy = bytes[place..end].to_vec();
                let at = dice.below(bytes.len() + 1);
                bytes.splice(at..at, copy);
            }
            5 => {
                let byte = INTERESTING[dice.below(INTERESTING.len())];
                bytes.splice(place..place, std::iter::repeat_n(byte, length));
            }
            6 => bytes.truncate(place),
            7 => {
                let other = &known[dice.below(known.len())];
                let from = dice.below(other.len() + 1);
                bytes.truncate(place);
                bytes.extend_from_slice(&other[from..]);
            }
            _ => {
                let other = &known[dice.below(known.len())];
                let from = dice.below(other.len() + 1);
                let part = other[from..(from + length).min(other.len())].to_vec();
                bytes.splice(place..place, part);
            }
        }
        bytes.truncate(LONGEST);
    }
    bytes
}
