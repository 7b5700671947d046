//! Classic BPF: the small programs that the kernel runs on each packet, and that need no privilege over the kernel.
//!
//! eBPF is for the host's root alone; these load in an ordinary user's namespaces, too. They have no loop: they only jump
//! forwards, and end after at most [`LONGEST`] instructions. A load of bytes that are not there ends the program with 0, so let
//! 0 be the answer that fails closed.

/// The most instructions that the kernel takes (`BPF_MAXINSNS`).
pub const LONGEST: usize = 4096;

// Operation codes of `linux/bpf_common.h`, put together.
const LOAD_WORD: u16 = 0x20;
const LOAD_HALF: u16 = 0x28;
const LOAD_BYTE: u16 = 0x30;
const LOAD_WORD_AT_X: u16 = 0x40;
const LOAD_HALF_AT_X: u16 = 0x48;
const LOAD_BYTE_AT_X: u16 = 0x50;
const LOAD_CELL: u16 = 0x60;
const LOAD_LENGTH: u16 = 0x80;
const LOAD_X_CELL: u16 = 0x61;
const LOAD_X_HEADER_LENGTH: u16 = 0xb1;
const STORE_CELL: u16 = 0x02;
const AND: u16 = 0x54;
const ADD: u16 = 0x04;
const SHIFT_LEFT: u16 = 0x64;
const ADD_X: u16 = 0x0c;
const JUMP: u16 = 0x05;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_GREATER: u16 = 0x25;
const JUMP_IF_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;

/// What the kernel knows of a packet (`SKF_AD_OFF` of `linux/filter.h`): the network protocol.
const PROTOCOL: u32 = 0xffff_f000;
/// The packet's mark.
const MARK: u32 = 0xffff_f000 + 20;
/// Offsets from here on count from the network header (`SKF_NET_OFF`), whatever is before it.
const NETWORK_HEADER: u32 = 0xfff0_0000;

/// One instruction (`struct sock_filter`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    code: u16,
    if_true: u8,
    if_false: u8,
    operand: u32,
}

impl Instruction {
    /// As the kernel takes it, in the machine's byte order.
    pub fn bytes(self) -> [u8; 8] {
        let [a, b] = self.code.to_ne_bytes();
        let [w, x, y, z] = self.operand.to_ne_bytes();
        [a, b, self.if_true, self.if_false, w, x, y, z]
    }
}

/// A place in a program that is jumped to. It is written after all that jumps there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label(usize);

/// A size of what is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// 8 bits.
    Byte,
    /// 16 bits.
    Half,
    /// 32 bits.
    Word,
}

/// A condition on the accumulator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Test {
    /// It is this.
    Is(u32),
    /// It is more than this.
    Above(u32),
    /// It has any of these bits.
    HasAny(u32),
}

/// A program under construction: an accumulator, an index register X, and 16 cells.
#[derive(Debug, Default)]
pub struct Assembler {
    instructions: Vec<Instruction>,
    /// Where each label is.
    places: Vec<Option<usize>>,
    /// Jumps whose way is not known yet: the instruction, and where it leads.
    open: Vec<(usize, Label)>,
}

impl Assembler {
    /// An empty program.
    pub fn new() -> Assembler {
        Assembler::default()
    }

    /// A new place, not yet written.
    pub fn label(&mut self) -> Label {
        self.places.push(None);
        Label(self.places.len() - 1)
    }

    /// The place is here.
    pub fn here(&mut self, label: Label) {
        self.places[label.0] = Some(self.instructions.len());
    }

    /// Loads the network protocol, as Ethernet numbers it.
    pub fn load_protocol(&mut self) {
        self.push(LOAD_WORD, PROTOCOL);
    }

    /// Loads the packet's mark.
    pub fn load_mark(&mut self) {
        self.push(LOAD_WORD, MARK);
    }

    /// Loads the packet's length with all headers.
    pub fn load_length(&mut self) {
        self.push(LOAD_LENGTH, 0);
    }

    /// Loads what is at `offset` from the network header.
    pub fn load(&mut self, size: Size, offset: u32) {
        let code = match size {
            Size::Byte => LOAD_BYTE,
            Size::Half => LOAD_HALF,
            Size::Word => LOAD_WORD,
        };
        self.push(code, NETWORK_HEADER + offset);
    }

    /// Loads what is at X and `offset` from the network header.
    pub fn load_at_x(&mut self, size: Size, offset: u32) {
        let code = match size {
            Size::Byte => LOAD_BYTE_AT_X,
            Size::Half => LOAD_HALF_AT_X,
            Size::Word => LOAD_WORD_AT_X,
        };
        self.push(code, NETWORK_HEADER + offset);
    }

    /// Loads X with the length of the IPv4 header.
    pub fn load_x_with_header_length(&mut self) {
        self.push(LOAD_X_HEADER_LENGTH, NETWORK_HEADER);
    }

    /// Stores the accumulator in a cell.
    pub fn store(&mut self, cell: u8) {
        self.push(STORE_CELL, cell.into());
    }

    /// Loads the accumulator from a cell.
    pub fn load_cell(&mut self, cell: u8) {
        self.push(LOAD_CELL, cell.into());
    }

    /// Loads X from a cell.
    pub fn load_x_cell(&mut self, cell: u8) {
        self.push(LOAD_X_CELL, cell.into());
    }

    /// Loads the accumulator with a number.
    pub fn set(&mut self, number: u32) {
        self.push(0x00, number);
    }

    /// Keeps these bits of the accumulator.
    pub fn and(&mut self, bits: u32) {
        self.push(AND, bits);
    }

    /// Adds a number.
    pub fn add(&mut self, number: u32) {
        self.push(ADD, number);
    }

    /// Adds X.
    pub fn add_x(&mut self) {
        self.push(ADD_X, 0);
    }

    /// Multiplies by 2 so many times.
    pub fn shift_left(&mut self, times: u32) {
        self.push(SHIFT_LEFT, times);
    }

    /// Jumps.
    pub fn jump(&mut self, to: Label) {
        self.open.push((self.instructions.len(), to));
        self.push(JUMP, 0);
    }

    /// Jumps where the condition holds.
    pub fn jump_if(&mut self, test: Test, to: Label) {
        self.test(test, 0, 1);
        self.jump(to);
    }

    /// Jumps where it does not.
    pub fn jump_unless(&mut self, test: Test, to: Label) {
        self.test(test, 1, 0);
        self.jump(to);
    }

    /// Ends with this answer.
    pub fn answer(&mut self, answer: u32) {
        self.push(RETURN, answer);
    }

    /// The program. `None` where it is longer than [`LONGEST`].
    ///
    /// # Panics
    /// A jump leads backwards, or to a place that was not written: the caller's fault.
    pub fn finish(mut self) -> Option<Vec<Instruction>> {
        for (from, Label(label)) in self.open {
            let to = self.places[label].expect("each place is written");
            let way = to.checked_sub(from + 1).expect("jumps lead forwards");
            self.instructions[from].operand = u32::try_from(way).ok()?;
        }
        (self.instructions.len() <= LONGEST).then_some(self.instructions)
    }

    /// The conditional jumps of the machine reach 255 instructions far; the one that follows them reaches everywhere.
    fn test(&mut self, test: Test, if_true: u8, if_false: u8) {
        let (code, operand) = match test {
            Test::Is(number) => (JUMP_IF_EQUAL, number),
            Test::Above(number) => (JUMP_IF_GREATER, number),
            Test::HasAny(bits) => (JUMP_IF_ANY_BIT, bits),
        };
        self.instructions.push(Instruction { code, if_true, if_false, operand });
    }

    fn push(&mut self, code: u16, operand: u32) {
        self.instructions.push(Instruction { code, if_true: 0, if_false: 0, operand });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_lead_to_their_places() {
        let mut program = Assembler::new();
        let (yes, no) = (program.label(), program.label());
        program.load_mark();
        program.jump_if(Test::Is(7), yes);
        program.jump_unless(Test::HasAny(8), no);
        program.here(yes);
        program.answer(1);
        program.here(no);
        program.answer(0);
        let code: Vec<_> = program.finish().unwrap().iter().map(|it| (it.code, it.if_true, it.if_false)).collect();
        assert_eq!(code, [(0x20, 0, 0), (0x15, 0, 1), (5, 0, 0), (0x45, 1, 0), (5, 0, 0), (6, 0, 0), (6, 0, 0)]);
    }

    #[test]
    fn a_program_that_the_kernel_would_not_take_is_none() {
        let mut program = Assembler::new();
        (0..LONGEST).for_each(|_| program.load_mark());
        program.answer(0);
        assert_eq!(program.finish(), None);
    }
}
