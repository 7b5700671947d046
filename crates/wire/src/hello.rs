//! Whether a connection speaks `justmtls/1`, from its first bytes (D9, T17).
//!
//! A TLS ClientHello (RFC 8446, section 4.1.2) that offers our ALPN (RFC 7301) is ours; everything else, an
//! application's own TLS too, is not. The classifier only looks: the bytes stay with the caller, who gives them either
//! to TLS or to the application.

/// The most bytes that are looked at, record headers included: a hello with post-quantum key shares has about 2 KiB.
pub const MAX_HELLO: usize = 16 * 1024;

/// What the bytes so far are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// They can still become either.
    NeedMore,
    /// A whole ClientHello that offers `justmtls/1`.
    JustMtls,
    /// Nothing that can come makes them one.
    Other,
}

/// Reads first bytes one by one, holds none of them, and is `Other` at the first byte after which no continuation of
/// at most [`MAX_HELLO`] bytes in all would be ours. A verdict other than [`Verdict::NeedMore`] is final.
#[derive(Clone, Copy, Debug)]
pub struct Classifier {
    verdict: Verdict,
    total: usize,
    record: Record,
    hello: Hello,
}

/// Where we are in the record layer (RFC 8446, section 5.1).
#[derive(Clone, Copy, Debug)]
enum Record {
    Type,
    MajorVersion,
    MinorVersion,
    LengthHigh,
    LengthLow { high: u8 },
    Fragment { left: usize },
}

/// Bytes of a record's header.
const RECORD_HEADER: usize = 5;
const HANDSHAKE: u8 = 22;
const CLIENT_HELLO: usize = 1;
const ALPN_EXTENSION: usize = 16;
const ALPN: &[u8] = crate::tunnel::ALPN;
/// Our name in a list of protocols, with the byte of its length.
const ALPN_ENTRY: usize = ALPN.len() + 1;
/// The extension that offers our protocol alone: type, length, length of the list, entry.
const ALPN_ALONE: usize = 2 + 2 + 2 + ALPN_ENTRY;
/// One compression method with its length, the length of the extensions, and ours alone.
const AFTER_SUITES: usize = 2 + 2 + ALPN_ALONE;
/// One cipher suite with the length of the list, and what follows.
const AFTER_SESSION: usize = 2 + 2 + AFTER_SUITES;
/// Version, random and an empty session id, and what follows.
const SHORTEST_BODY: usize = 34 + 1 + AFTER_SESSION;

/// Where we are in the ClientHello: the field that is being read, and what is left of everything around it.
#[derive(Clone, Copy, Debug)]
struct Hello {
    field: Field,
    /// Bytes of the field that are still to come.
    left: usize,
    /// Value of the field so far, where it is a number.
    number: usize,
    /// Bytes of the handshake message that are still to come, once its length is known.
    body: Option<usize>,
    /// Bytes of the list of protocols that are still to come.
    list: usize,
    /// Whether the name that is being read has been ours so far.
    ours: bool,
    /// Whether ours was in the list.
    found: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Field {
    MessageType,
    MessageLength,
    VersionAndRandom,
    SessionLength,
    Session,
    SuitesLength,
    Suites,
    MethodsLength,
    Methods,
    ExtensionsLength,
    ExtensionType,
    ExtensionLength { alpn: bool },
    Extension,
    ListLength { extension: usize },
    NameLength,
    Name,
}

/// Not ours, for certain.
struct NotOurs;

impl Default for Classifier {
    fn default() -> Self {
        Self::new()
    }
}

impl Classifier {
    /// A classifier that has seen nothing.
    pub fn new() -> Self {
        Self { verdict: Verdict::NeedMore, total: 0, record: Record::Type, hello: Hello::new() }
    }

    /// Looks at the bytes that came after those of the last call.
    pub fn push(&mut self, bytes: &[u8]) -> Verdict {
        for byte in bytes {
            if self.verdict != Verdict::NeedMore {
                break;
            }
            self.verdict = self.step(*byte).unwrap_or(Verdict::Other);
        }
        self.verdict
    }

    /// The verdict on what has been seen.
    pub fn verdict(&self) -> Verdict {
        self.verdict
    }

    fn step(&mut self, byte: u8) -> Result<Verdict, NotOurs> {
        let verdict = self.read(byte)?;
        // The first byte of a length can rule out every second one; then the first one decides.
        let record_fits =
            !matches!(self.record, Record::LengthLow { .. }) || some_byte(|low| { *self }.read(low).is_ok());
        let hello_fits = !self.hello.awaits_low_byte() || some_byte(|low| { self.hello }.read(low).is_ok());
        require(verdict != Verdict::NeedMore || (record_fits && hello_fits))?;
        Ok(verdict)
    }

    fn read(&mut self, byte: u8) -> Result<Verdict, NotOurs> {
        self.total += 1;
        self.record = match self.record {
            Record::Type if byte == HANDSHAKE => Record::MajorVersion,
            Record::MajorVersion if byte == 3 => Record::MinorVersion,
            // The minor version of a record says nothing (RFC 8446, section 5.1).
            Record::MinorVersion => Record::LengthHigh,
            Record::LengthHigh => Record::LengthLow { high: byte },
            Record::LengthLow { high } => match usize::from(u16::from_be_bytes([high, byte])) {
                left @ 1..=16_384 => Record::Fragment { left },
                _ => return Err(NotOurs),
            },
            Record::Fragment { left } => {
                if self.hello.read(byte)? {
                    return Ok(Verdict::JustMtls);
                }
                if left > 1 { Record::Fragment { left: left - 1 } } else { Record::Type }
            }
            Record::Type | Record::MajorVersion => return Err(NotOurs),
        };
        if self.total + self.shortest_rest() > MAX_HELLO {
            return Err(NotOurs);
        }
        Ok(Verdict::NeedMore)
    }

    /// The fewest bytes that complete a hello of ours: those of the message, and the headers that they need.
    fn shortest_rest(&self) -> usize {
        let hello = self.hello.shortest_rest();
        let header = |of_which_read: usize| RECORD_HEADER - of_which_read;
        hello
            + match self.record {
                Record::Type => header(0),
                Record::MajorVersion => header(1),
                Record::MinorVersion => header(2),
                Record::LengthHigh => header(3),
                Record::LengthLow { .. } => header(4),
                // What does not fit into this record fits into one more.
                Record::Fragment { left } if left < hello => header(0),
                Record::Fragment { .. } => 0,
            }
    }
}

impl Hello {
    fn new() -> Self {
        Self { field: Field::MessageType, left: 1, number: 0, body: None, list: 0, ours: false, found: false }
    }

    /// Takes a byte; `true` where it completes a hello of ours.
    fn read(&mut self, byte: u8) -> Result<bool, NotOurs> {
        self.left -= 1;
        self.body = self.body.map(|body| body - 1);
        if self.field == Field::Name {
            self.read_name(byte)?;
        } else {
            // The high bits fall off in long fields, whose value nobody asks for.
            self.number = (self.number << 8) | usize::from(byte);
        }
        while self.left == 0 {
            if self.finish_field()? {
                return Ok(true);
            }
            self.number = 0;
        }
        Ok(false)
    }

    /// Whether one more byte completes a number of several.
    fn awaits_low_byte(&self) -> bool {
        let wide = matches!(
            self.field,
            Field::MessageLength
                | Field::SuitesLength
                | Field::ExtensionsLength
                | Field::ExtensionType
                | Field::ExtensionLength { .. }
                | Field::ListLength { .. }
        );
        wide && self.left == 1
    }

    fn read_name(&mut self, byte: u8) -> Result<(), NotOurs> {
        self.list -= 1;
        if self.ours {
            self.ours = ALPN[ALPN.len() - 1 - self.left] == byte;
        }
        let behind = self.list - self.left;
        require(self.found || self.ours || can_offer_ours(behind))
    }

    fn finish_field(&mut self) -> Result<bool, NotOurs> {
        let number = self.number;
        let body = self.body.unwrap_or(0);
        (self.field, self.left) = match self.field {
            Field::MessageType => {
                require(number == CLIENT_HELLO)?;
                (Field::MessageLength, 3)
            }
            Field::MessageLength => {
                require((SHORTEST_BODY..=MAX_HELLO).contains(&number))?;
                self.body = Some(number);
                (Field::VersionAndRandom, 34)
            }
            Field::VersionAndRandom => (Field::SessionLength, 1),
            Field::SessionLength => {
                require(number <= 32 && body >= number + AFTER_SESSION)?;
                (Field::Session, number)
            }
            Field::Session => (Field::SuitesLength, 2),
            Field::SuitesLength => {
                require(number >= 2 && number.is_multiple_of(2) && body >= number + AFTER_SUITES)?;
                (Field::Suites, number)
            }
            Field::Suites => (Field::MethodsLength, 1),
            Field::MethodsLength => {
                require(number >= 1 && body >= number + 2 && can_extend_to_ours(body - number - 2))?;
                (Field::Methods, number)
            }
            Field::Methods => (Field::ExtensionsLength, 2),
            Field::ExtensionsLength => {
                require(number == body)?;
                (Field::ExtensionType, 2)
            }
            Field::ExtensionType => {
                let alpn = number == ALPN_EXTENSION;
                require(if self.found { !alpn } else { alpn || body >= 2 + ALPN_ALONE })?;
                (Field::ExtensionLength { alpn }, 2)
            }
            Field::ExtensionLength { alpn } => {
                let behind = body.checked_sub(number).ok_or(NotOurs)?;
                if alpn {
                    require(number >= 2 && can_offer_ours(number - 2) && can_extend(behind))?;
                    (Field::ListLength { extension: number }, 2)
                } else {
                    require(if self.found { can_extend(behind) } else { can_extend_to_ours(behind) })?;
                    (Field::Extension, number)
                }
            }
            Field::Extension => return self.next_extension(body),
            Field::ListLength { extension } => {
                require(number + 2 == extension)?;
                self.list = number;
                (Field::NameLength, 1)
            }
            Field::NameLength => {
                self.list -= 1;
                let behind = self.list.checked_sub(number).ok_or(NotOurs)?;
                self.ours = number == ALPN.len() && can_offer(behind);
                require(number >= 1)?;
                require(self.ours || if self.found { can_offer(behind) } else { can_offer_ours(behind) })?;
                (Field::Name, number)
            }
            Field::Name => {
                self.found |= self.ours;
                if self.list == 0 {
                    return self.next_extension(body);
                }
                (Field::NameLength, 1)
            }
        };
        Ok(false)
    }

    fn next_extension(&mut self, body: usize) -> Result<bool, NotOurs> {
        if body == 0 {
            return require(self.found).map(|()| true);
        }
        (self.field, self.left) = (Field::ExtensionType, 2);
        Ok(false)
    }

    /// The fewest bytes of the handshake message that are still to come.
    fn shortest_rest(&self) -> usize {
        match (self.body, self.field) {
            (Some(body), _) => body,
            (None, Field::MessageType) => 4 + SHORTEST_BODY,
            // The bytes of the length that are known say how long the body is at least.
            (None, _) => self.left + (self.number << (8 * self.left)).max(SHORTEST_BODY),
        }
    }
}

fn some_byte(fits: impl FnMut(u8) -> bool) -> bool {
    (0..=u8::MAX).any(fits)
}

fn require(holds: bool) -> Result<(), NotOurs> {
    if holds { Ok(()) } else { Err(NotOurs) }
}

/// Whether so many bytes can be a list of protocols that offers ours: alone, or with names of one byte and more.
fn can_offer_ours(bytes: usize) -> bool {
    bytes == ALPN_ENTRY || bytes >= ALPN_ENTRY + 2
}

/// Whether so many bytes can be the rest of a list of protocols.
fn can_offer(bytes: usize) -> bool {
    bytes != 1
}

/// Whether so many bytes can be extensions that offer ours.
fn can_extend_to_ours(bytes: usize) -> bool {
    bytes == ALPN_ALONE || bytes >= ALPN_ALONE + 2
}

/// Whether so many bytes can be the rest of the extensions.
fn can_extend(bytes: usize) -> bool {
    bytes == 0 || bytes >= 4
}
