//! Rust source told apart into code, comments and tokens: as much of the language as the rules need, and no more.

/// Two views of one source text. Both have its length and its lines, so that an offset means the same in all three.
pub(crate) struct Views {
    /// Comments and the contents of string and character literals are blanks.
    pub(crate) code: String,
    /// All but comments is blank.
    pub(crate) comments: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Code,
    Comment,
    Literal,
}

impl Views {
    pub(crate) fn of(text: &str) -> Self {
        let kinds = classify(text.as_bytes());
        let view = |keep: Kind| {
            let bytes =
                text.bytes().zip(&kinds).map(|(byte, kind)| if *kind == keep || byte == b'\n' { byte } else { b' ' });
            // A kept run starts and ends at ASCII delimiters, so that no character is cut in two.
            String::from_utf8_lossy(&bytes.collect::<Vec<u8>>()).into_owned()
        };
        Self { code: view(Kind::Code), comments: view(Kind::Comment) }
    }
}

fn classify(text: &[u8]) -> Vec<Kind> {
    let mut kinds = vec![Kind::Code; text.len()];
    let mut at = 0;
    while at < text.len() {
        let (kind, end) = match text[at] {
            b'/' if text.get(at + 1) == Some(&b'/') => (Kind::Comment, find(text, at, b'\n')),
            b'/' if text.get(at + 1) == Some(&b'*') => (Kind::Comment, block_comment_end(text, at)),
            b'"' => (Kind::Literal, string_end(text, at + 1)),
            b'r' | b'b' | b'c' if !(at > 0 && is_word(text[at - 1])) => prefixed(text, at),
            b'\'' => character_end(text, at).map_or((Kind::Code, at + 1), |end| (Kind::Literal, end)),
            _ => (Kind::Code, at + 1),
        };
        kinds[at..end].fill(kind);
        if kind == Kind::Literal {
            // The quotes stay: a blanked string is still seen to be one.
            kinds[at] = Kind::Code;
            kinds[end - 1] = Kind::Code;
        }
        at = end;
    }
    kinds
}

/// What starts with `r`, `b` or `c`: a raw, byte or C string, or just a word.
fn prefixed(text: &[u8], at: usize) -> (Kind, usize) {
    let letters = text[at..].iter().take(2).take_while(|byte| matches!(byte, b'r' | b'b' | b'c')).count();
    let raw = text[at..at + letters].contains(&b'r');
    let hashes = text[at + letters..].iter().take_while(|byte| **byte == b'#').count();
    let quote = at + letters + hashes;
    match text.get(quote) {
        Some(b'"') if raw => (Kind::Literal, raw_end(text, quote + 1, hashes)),
        Some(b'"') if hashes == 0 => (Kind::Literal, string_end(text, quote + 1)),
        Some(b'\'') if hashes == 0 && !raw => {
            character_end(text, quote).map_or((Kind::Code, at + letters), |end| (Kind::Literal, end))
        }
        _ => (Kind::Code, at + letters),
    }
}

fn find(text: &[u8], from: usize, byte: u8) -> usize {
    text[from..].iter().position(|b| *b == byte).map_or(text.len(), |offset| from + offset)
}

fn block_comment_end(text: &[u8], start: usize) -> usize {
    let mut depth = 0_usize;
    let mut at = start;
    while at + 1 < text.len() {
        match &text[at..at + 2] {
            b"/*" => (depth, at) = (depth + 1, at + 2),
            b"*/" if depth == 1 => return at + 2,
            b"*/" => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
    }
    text.len()
}

fn string_end(text: &[u8], mut at: usize) -> usize {
    while at < text.len() {
        match text[at] {
            b'\\' => at += 2,
            b'"' => return at + 1,
            _ => at += 1,
        }
    }
    text.len()
}

fn raw_end(text: &[u8], mut at: usize, hashes: usize) -> usize {
    while at < text.len() {
        let closing = text[at + 1..].iter().take(hashes).take_while(|byte| **byte == b'#').count();
        if text[at] == b'"' && closing == hashes {
            return at + 1 + hashes;
        }
        at += 1;
    }
    text.len()
}

/// Where a character literal ends, or `None` for a lifetime.
fn character_end(text: &[u8], at: usize) -> Option<usize> {
    if text.get(at + 1) == Some(&b'\\') {
        let body = text.get(at + 3..)?;
        return body.iter().take(10).position(|byte| *byte == b'\'').map(|offset| at + 3 + offset + 1);
    }
    // One character of up to four bytes, then the quote.
    let width = match text.get(at + 1)? {
        0x00..=0x7f => 1,
        0xc0..=0xdf => 2,
        0xe0..=0xef => 3,
        _ => 4,
    };
    (text.get(at + 1 + width) == Some(&b'\'')).then_some(at + width + 2)
}

pub(crate) fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// A word, a number, or one character of punctuation, with its offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Token<'a> {
    pub(crate) text: &'a str,
    pub(crate) offset: usize,
}

/// The tokens of the `code` view.
pub(crate) fn tokens(code: &str) -> Vec<Token<'_>> {
    let bytes = code.as_bytes();
    let mut tokens = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let start = at;
        at += 1;
        if bytes[start].is_ascii_whitespace() || !bytes[start].is_ascii() {
            continue;
        }
        if is_word(bytes[start]) {
            while at < bytes.len() && is_word(bytes[at]) {
                at += 1;
            }
        }
        tokens.push(Token { text: &code[start..at], offset: start });
    }
    tokens
}

/// The line of an offset, counted from 1.
pub(crate) fn line_of(text: &str, offset: usize) -> usize {
    1 + text.as_bytes()[..offset].iter().filter(|byte| **byte == b'\n').count()
}

/// Where a word stands by itself.
pub(crate) fn word_offsets(text: &str, word: &str) -> Vec<usize> {
    let bytes = text.as_bytes();
    let alone = |at: &usize| {
        let before = at.checked_sub(1).is_some_and(|before| is_word(bytes[before]));
        !before && !bytes.get(at + word.len()).is_some_and(|byte| is_word(*byte))
    };
    text.match_indices(word).map(|(at, _)| at).filter(alone).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> String {
        tokens(&Views::of(text).code).iter().map(|token| token.text).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn comments_are_not_code() {
        assert_eq!(words("a // unsafe\nb /* x /* y */ z */ c"), "a b c");
        assert_eq!(Views::of("a // b\nc").comments, "  // b\n ");
    }

    #[test]
    fn contents_of_literals_are_not_code() {
        assert_eq!(words(r#"a "unsafe \" x" b"#), "a \" \" b");
        assert_eq!(words("r#\"one \" two\"# c"), "r # c");
        assert_eq!(words("br\"//\" c\"x\" b'x' '\\'' '\"' d"), "b \" c \" b ' ' ' ' ' d");
        assert_eq!(words("'é' '—' e"), "' ' ' ' e");
    }

    #[test]
    fn a_lifetime_is_no_literal() {
        assert_eq!(words("fn f<'a>(x: &'a str) {}"), "fn f < ' a > ( x : & ' a str ) { }");
    }

    #[test]
    fn views_keep_length_and_lines() {
        let text = "let s = \"é\n\"; // ü\nx";
        let views = Views::of(text);
        assert_eq!((views.code.len(), views.comments.len()), (text.len(), text.len()));
        assert_eq!(line_of(text, text.len() - 1), 3);
    }

    #[test]
    fn an_unfinished_literal_or_comment_ends_with_the_text() {
        for text in ["\"abc", "r#\"abc", "/* a", "'\\", "b", "r#", "'"] {
            assert_eq!(Views::of(text).code.len(), text.len(), "{text}");
        }
    }
}
