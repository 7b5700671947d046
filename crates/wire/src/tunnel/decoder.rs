//! Takes the bytes of one direction of a tunnel apart, as they come.

use super::{Control, FrameKind, HEADER, MAX_CONTROL_FRAME, Sender, Sequence, Violation};

/// What comes out of a [`Decoder`].
#[derive(PartialEq, Eq, Debug)]
pub enum Piece<'a> {
    /// A whole control frame.
    Control(Control),
    /// Bytes of the application: a part of a `Data` frame, where it lies in the input. Never empty.
    Data(&'a [u8]),
}

/// An incremental decoder. It keeps a header or control frame of which only a part has come, at most
/// [`MAX_CONTROL_FRAME`] bytes, and never a byte of `Data`.
pub struct Decoder {
    sequence: Sequence,
    /// Bytes of a `Data` frame that are still to come.
    data: usize,
    /// The beginning of a header or control frame.
    kept: Vec<u8>,
    failed: Option<Violation>,
}

impl Decoder {
    /// A decoder for what `sender` sends, from the first byte of the TLS connection on.
    pub fn new(sender: Sender) -> Self {
        Self { sequence: Sequence::new(sender), data: 0, kept: Vec::new(), failed: None }
    }

    /// Takes the next piece off the front of `input`. `None`: all of `input` was taken and more is needed.
    ///
    /// # Errors
    /// The peer broke the protocol. That is final: the same violation is returned from then on.
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Piece<'a>>, Violation> {
        if let Some(violation) = self.failed {
            return Err(violation);
        }
        self.advance(input).inspect_err(|violation| self.failed = Some(*violation))
    }

    /// Whether the stream may end here: not within a frame, and with no lease open in this direction.
    pub fn may_end(&self) -> bool {
        self.failed.is_none() && self.kept.is_empty() && self.data == 0 && self.sequence.may_end()
    }

    fn advance<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Piece<'a>>, Violation> {
        loop {
            if self.data > 0 {
                return Ok(self.take_data(input));
            }
            let Some(header) = self.take(input, HEADER) else { return Ok(None) };
            let (kind, length) = read_header(header)?;
            // A frame that may not come now is refused by its header: its payload is never waited for.
            let expected = self.sequence.lease(kind);
            let mut after = self.sequence;
            after.step(kind)?;
            if kind == FrameKind::Data {
                self.kept.clear();
                self.sequence = after;
                self.data = length;
                continue;
            }
            let Some(frame) = self.take(input, HEADER + length) else { return Ok(None) };
            let control = Control::decode(kind, &frame[HEADER..])?;
            if control.lease() != expected {
                return Err(Violation::WrongLease);
            }
            self.kept.clear();
            self.sequence = after;
            return Ok(Some(Piece::Control(control)));
        }
    }

    fn take_data<'a>(&mut self, input: &mut &'a [u8]) -> Option<Piece<'a>> {
        let (data, rest) = input.split_at(self.data.min(input.len()));
        *input = rest;
        self.data -= data.len();
        (!data.is_empty()).then_some(Piece::Data(data))
    }

    /// Keeps bytes of `input` until `length` are there; `None` where they are not.
    fn take(&mut self, input: &mut &[u8], length: usize) -> Option<&[u8]> {
        debug_assert!(length <= MAX_CONTROL_FRAME);
        let missing = length.saturating_sub(self.kept.len()).min(input.len());
        let (bytes, rest) = input.split_at(missing);
        self.kept.extend_from_slice(bytes);
        *input = rest;
        self.kept.get(..length)
    }
}

fn read_header(header: &[u8]) -> Result<(FrameKind, usize), Violation> {
    let &[code, high, middle, low] = header else { return Err(Violation::FrameTooShort) };
    let kind = FrameKind::from_code(code).ok_or(Violation::UnknownFrame)?;
    let length = u32::from_be_bytes([0, high, middle, low]) as usize;
    kind.check_length(length)?;
    Ok((kind, length))
}
