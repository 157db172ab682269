//! Text to terms: the analyser `unicode-v1`, frozen once it has shipped.
//!
//! The same function cuts passages when they are indexed and questions when they are asked, so a
//! change to it would make every existing index disagree with its questions. Its golden test holds
//! the output for a dozen scripts; another behaviour needs another name.
//!
//! In order:
//! 1. Format characters that only steer rendering (soft hyphen, joiners, direction marks,
//!    variation selectors) are dropped.
//! 2. NFKC, full case folding, NFKC again: composed and decomposed accents, full-width digits,
//!    `STRASSE` and `Straße`, final and medial sigma all meet.
//! 3. UAX #29 word boundaries. A word holds a letter or a digit, or is an emoji; the rest goes.
//! 4. Words are also cut at apostrophes, colons and the full stops between letters, which UAX #29
//!    keeps inside: so `l'homme` is found by `homme`, `Darwin's` by `Darwin`, `J.K.` by `J. K.`, and
//!    a sentence that starts without a space does not swallow its neighbours. `3.14` stays whole.
//! 5. Scripts that are written without spaces (and Hangul, whose words carry their particles) give
//!    overlapping pairs of characters; a lone character stays alone.
//! 6. Optionally, the Snowball stemmer for English.
//! 7. A term longer than [`MAX_TERM_BYTES`] is cut there, at a character.

use std::borrow::Cow;

use caseless::Caseless;
use serde::{Deserialize, Serialize};
use tantivy::tokenizer::{Token, TokenStream, Tokenizer};
use unicode_normalization::{IsNormalized, UnicodeNormalization, is_nfkc_quick};
use unicode_segmentation::UnicodeSegmentation;

use crate::error::{Error, Result};

/// The name of the only analyser so far.
pub const UNICODE_V1: &str = "unicode-v1";

/// Longer terms are cut to this many bytes.
pub const MAX_TERM_BYTES: usize = 255;

/// Which analyser an index was made with, as the manifest records it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnalyserSpec {
    /// Always `unicode-v1` so far.
    pub name: String,
    /// `english`, or none.
    pub stemmer: Option<String>,
}

impl Default for AnalyserSpec {
    fn default() -> Self {
        Self {
            name: UNICODE_V1.to_owned(),
            stemmer: None,
        }
    }
}

/// Cuts text into terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Analyser {
    stem_english: bool,
}

impl Analyser {
    /// The analyser that a spec names.
    pub fn new(spec: &AnalyserSpec) -> Result<Self> {
        if spec.name != UNICODE_V1 {
            return Err(unknown("analyser", &spec.name, UNICODE_V1));
        }
        match spec.stemmer.as_deref() {
            None => Ok(Self {
                stem_english: false,
            }),
            Some("english") => Ok(Self { stem_english: true }),
            Some(other) => Err(unknown("stemmer", other, "english")),
        }
    }

    /// The name under which Tantivy knows this analyser; part of the index's schema.
    pub(super) fn tokenizer_name(self) -> &'static str {
        if self.stem_english {
            "unicode-v1+english"
        } else {
            UNICODE_V1
        }
    }

    /// The terms of a text, in order, repetitions included.
    pub fn terms(self, text: &str) -> Vec<String> {
        let mut terms = Vec::with_capacity(text.len() / 6);
        self.each_term(text, |term| terms.push(term.to_owned()));
        terms
    }

    fn each_term(self, text: &str, mut sink: impl FnMut(&str)) {
        let stemmer = self
            .stem_english
            .then(|| rust_stemmers::Stemmer::create(rust_stemmers::Algorithm::English));
        let folded = fold(text);
        let mut emit_word = |word: &str| match &stemmer {
            Some(stemmer) if word.is_ascii() => sink(shorten(&stemmer.stem(word))),
            _ => sink(shorten(word)),
        };
        let mut run = Run::default();
        for chunk in chunks(&folded) {
            if chunk.is_ascii() {
                run.flush(&mut emit_word);
                for word in chunk.unicode_words() {
                    cut_word(word, &mut emit_word);
                }
            } else {
                for segment in chunk.split_word_bounds() {
                    cut_segment(segment, &mut run, &mut emit_word);
                }
            }
        }
        run.flush(&mut emit_word);
    }
}

/// Pieces of a text whose words are those of the text: only what is not ASCII needs the slow way.
///
/// It is cut before a space that an ASCII letter or digit follows. What is on one side of such a space
/// decides no word boundary on the other (a space followed by a combining mark would belong to it).
fn chunks(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = (!text.is_empty()).then_some(text);
    std::iter::from_fn(move || {
        let text = rest.take()?;
        if text.is_ascii() {
            return Some(text);
        }
        let bytes = text.as_bytes();
        let is_cut = |at: usize| {
            bytes.get(at) == Some(&b' ') && bytes.get(at + 1).is_some_and(u8::is_ascii_alphanumeric)
        };
        // The whole ASCII beginning as one, then one word that is not.
        let foreign = bytes.iter().position(|b| !b.is_ascii())?;
        let end = match (1..foreign).rev().find(|at| is_cut(*at)) {
            Some(before) => Some(before),
            None => (foreign..bytes.len()).find(|at| is_cut(*at)),
        };
        let (chunk, after) = text.split_at(end.unwrap_or(text.len()));
        rest = (!after.is_empty()).then_some(after);
        Some(chunk)
    })
}

fn unknown(what: &str, found: &str, known: &str) -> Error {
    Error::invalid(format!(
        "unknown {what} {found:?}: this version knows {known:?}"
    ))
}

/// NFKC(case fold(NFKC(text without format characters))).
fn fold(text: &str) -> Cow<'_, str> {
    if text.is_ascii() {
        return if text.bytes().any(|b| b.is_ascii_uppercase()) {
            Cow::Owned(text.to_ascii_lowercase())
        } else {
            Cow::Borrowed(text)
        };
    }
    let visible: Cow<'_, str> = if text.chars().any(is_ignorable) {
        Cow::Owned(text.chars().filter(|c| !is_ignorable(*c)).collect())
    } else {
        Cow::Borrowed(text)
    };
    let folded = fold_case(&composed(visible));
    Cow::Owned(composed(Cow::Owned(folded)).into_owned())
}

/// NFKC, which most text is already.
fn composed(text: Cow<'_, str>) -> Cow<'_, str> {
    match is_nfkc_quick(text.chars()) {
        IsNormalized::Yes => text,
        _ => Cow::Owned(text.nfkc().collect()),
    }
}

fn fold_case(text: &str) -> String {
    let mut folded = String::with_capacity(text.len());
    for c in text.chars() {
        match c.is_ascii() {
            true => folded.push(c.to_ascii_lowercase()),
            false => folded.extend(std::iter::once(c).default_case_fold()),
        }
    }
    folded
}

/// Characters that steer rendering and carry no text of their own.
fn is_ignorable(c: char) -> bool {
    matches!(c, '\u{AD}' | '\u{61C}' | '\u{180B}'..='\u{180F}' | '\u{200C}'..='\u{200F}'
        | '\u{202A}'..='\u{202E}' | '\u{2060}'..='\u{2064}' | '\u{2066}'..='\u{206F}'
        | '\u{FE00}'..='\u{FE0F}' | '\u{FEFF}' | '\u{E0100}'..='\u{E01EF}')
}

fn cuts_words(c: char) -> bool {
    matches!(
        c,
        '\'' | ':' | '\u{2018}' | '\u{2019}' | '\u{201B}' | '\u{2BC}'
    )
}

fn is_emoji(c: char) -> bool {
    matches!(c, '\u{1F000}'..='\u{1FAFF}' | '\u{2600}'..='\u{27BF}' | '\u{2B00}'..='\u{2BFF}')
}

/// Scripts that give pairs of characters; runs of different families do not pair with each other.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    EastAsian,
    SouthEastAsian,
}

fn family(c: char) -> Option<Family> {
    if c < '\u{E00}' {
        return None;
    }
    match c {
        // Thai, Lao; Myanmar and its extensions; Khmer. Digits of these scripts stay words.
        '\u{E50}'..='\u{E59}'
        | '\u{ED0}'..='\u{ED9}'
        | '\u{1040}'..='\u{1049}'
        | '\u{1090}'..='\u{1099}'
        | '\u{17E0}'..='\u{17E9}' => None,
        '\u{E01}'..='\u{EFF}'
        | '\u{1000}'..='\u{109F}'
        | '\u{1780}'..='\u{17FF}'
        | '\u{A9E0}'..='\u{A9FE}'
        | '\u{AA60}'..='\u{AA7F}' => Some(Family::SouthEastAsian),
        // Hangul jamo and syllables; kana; Han and its extensions; bopomofo.
        '\u{1100}'..='\u{11FF}'
        | '\u{A960}'..='\u{A97F}'
        | '\u{AC00}'..='\u{D7FF}'
        | '\u{3005}'..='\u{3007}'
        | '\u{3021}'..='\u{3029}'
        | '\u{3031}'..='\u{3035}'
        | '\u{3038}'..='\u{303C}'
        | '\u{3041}'..='\u{3096}'
        | '\u{309D}'..='\u{309F}'
        | '\u{30A1}'..='\u{30FA}'
        | '\u{30FC}'..='\u{30FF}'
        | '\u{3105}'..='\u{312F}'
        | '\u{3131}'..='\u{318E}'
        | '\u{31A0}'..='\u{31BF}'
        | '\u{31F0}'..='\u{31FF}'
        | '\u{3400}'..='\u{4DBF}'
        | '\u{4E00}'..='\u{9FFF}'
        | '\u{F900}'..='\u{FAFF}'
        | '\u{1AFF0}'..='\u{1B16F}'
        | '\u{20000}'..='\u{3FFFF}' => Some(Family::EastAsian),
        _ => None,
    }
}

/// Adjacent characters of one family, given out as overlapping pairs.
#[derive(Default)]
struct Run {
    family: Option<Family>,
    previous: String,
    paired: bool,
}

impl Run {
    fn push(&mut self, family: Family, grapheme: &str, emit: &mut impl FnMut(&str)) {
        if self.family != Some(family) {
            self.flush(emit);
            self.family = Some(family);
        } else {
            let before = self.previous.len();
            self.previous.push_str(grapheme);
            emit(&self.previous);
            self.paired = true;
            self.previous.drain(..before);
            return;
        }
        self.previous.clear();
        self.previous.push_str(grapheme);
    }

    fn flush(&mut self, emit: &mut impl FnMut(&str)) {
        if self.family.take().is_some() && !self.paired {
            emit(&self.previous);
        }
        self.previous.clear();
        self.paired = false;
    }
}

/// One piece between word boundaries: a word, an emoji, characters of a run, or nothing.
fn cut_segment(segment: &str, run: &mut Run, emit: &mut impl FnMut(&str)) {
    if !segment.chars().any(|c| family(c).is_some()) {
        run.flush(emit);
        if segment.chars().any(char::is_alphanumeric)
            || segment.chars().next().is_some_and(is_emoji)
        {
            cut_word(segment, emit);
        }
        return;
    }
    // A segment may mix scripts, as in "LG전자": cut it where the family changes.
    let mut word_start = None;
    for (at, grapheme) in segment.grapheme_indices(true) {
        match grapheme.chars().next().and_then(family) {
            Some(family) => {
                if let Some(start) = word_start.take() {
                    cut_word(&segment[start..at], emit);
                }
                run.push(family, grapheme, emit);
            }
            None => {
                run.flush(emit);
                word_start.get_or_insert(at);
            }
        }
    }
    if let Some(start) = word_start {
        cut_word(&segment[start..], emit);
    }
}

fn cut_word(word: &str, emit: &mut impl FnMut(&str)) {
    let mut start = 0;
    let mut digit_before = false;
    let mut characters = word.char_indices().peekable();
    while let Some((at, c)) = characters.next() {
        let digit_after = characters.peek().is_some_and(|(_, next)| next.is_numeric());
        if cuts_words(c) || (c == '.' && !(digit_before && digit_after)) {
            if start < at {
                emit(&word[start..at]);
            }
            start = at + c.len_utf8();
        }
        digit_before = c.is_numeric();
    }
    if start < word.len() {
        emit(&word[start..]);
    }
}

fn shorten(term: &str) -> &str {
    if term.len() <= MAX_TERM_BYTES {
        return term;
    }
    let mut end = MAX_TERM_BYTES;
    while !term.is_char_boundary(end) {
        end -= 1;
    }
    &term[..end]
}

/// The analyser in Tantivy's clothes, for indexing. Offsets are not used by the schema and stay 0.
impl Tokenizer for Analyser {
    type TokenStream<'a> = Terms;

    fn token_stream<'a>(&'a mut self, text: &'a str) -> Terms {
        let mut terms = String::with_capacity(text.len());
        let mut ends = Vec::with_capacity(text.len() / 5);
        self.each_term(text, |term| {
            terms.push_str(term);
            ends.push(terms.len());
        });
        Terms {
            terms,
            ends: ends.into_iter(),
            start: 0,
            token: Token::default(),
        }
    }
}

/// The terms of one text, one after the other.
#[derive(Debug)]
pub struct Terms {
    /// All of them, without anything between.
    terms: String,
    ends: std::vec::IntoIter<usize>,
    start: usize,
    token: Token,
}

impl TokenStream for Terms {
    fn advance(&mut self) -> bool {
        let Some(end) = self.ends.next() else {
            return false;
        };
        let term = self.terms.get(self.start..end).unwrap_or_default();
        self.token.text.clear();
        self.token.text.push_str(term);
        self.token.position = self.token.position.wrapping_add(1);
        self.start = end;
        true
    }

    fn token(&self) -> &Token {
        &self.token
    }

    fn token_mut(&mut self) -> &mut Token {
        &mut self.token
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plain(text: &str) -> Vec<String> {
        Analyser {
            stem_english: false,
        }
        .terms(text)
    }

    /// Frozen: a difference here means that existing indexes disagree with their questions.
    #[test]
    fn golden() {
        let cases: &[(&str, &[&str])] = &[
            (
                "The U.S. Senate's 3.14 vote, in 1,000 B.C.",
                &[
                    "the", "u", "s", "senate", "s", "3.14", "vote", "in", "1,000", "b", "c",
                ],
            ),
            ("Straße STRASSE", &["strasse", "strasse"]),
            (
                "Caf\u{e9} Cafe\u{301} ﬁn",
                &["caf\u{e9}", "caf\u{e9}", "fin"],
            ),
            (
                "J.K. Rowling:J. K. end.Next",
                &["j", "k", "rowling", "j", "k", "end", "next"],
            ),
            ("L’homme d'Artagnan", &["l", "homme", "d", "artagnan"]),
            ("Ὀδυσσεύς ΟΔΥΣΣΕΥΣ", &["ὀδυσσεύσ", "οδυσσευσ"]),
            (
                "Лев Толстой, «Война и мир»",
                &["лев", "толстой", "война", "и", "мир"],
            ),
            ("القاهرة هي عاصمة مصر.", &["القاهرة", "هي", "عاصمة", "مصر"]),
            ("می\u{200c}خواهم", &["میخواهم"]),
            ("ירושלים צה\"ל", &["ירושלים", "צה\"ל"]),
            ("नमस्ते दुनिया", &["नमस्ते", "दुनिया"]),
            ("กรุงเทพ", &["กรุ", "รุง", "งเ", "เท", "ทพ"]),
            ("ភ្នំពេញ", &["ភ្នំ", "នំពេ", "ពេញ"]),
            (
                "北京是中国的首都。",
                &["北京", "京是", "是中", "中国", "国的", "的首", "首都"],
            ),
            (
                "東京タワーへ行く",
                &["東京", "京タ", "タワ", "ワー", "ーへ", "へ行", "行く"],
            ),
            ("山", &["山"]),
            ("LG전자 2020년", &["lg", "전자", "2020", "년"]),
            ("서울은 수도", &["서울", "울은", "수도"]),
            ("ＡＢＣ １２３ ㍿", &["abc", "123", "株式", "式会", "会社"]),
            ("rocket 🚀🇫🇷 ❤️", &["rocket", "🚀", "🇫🇷", "❤"]),
            (
                "co\u{ad}operate foo_bar a-b",
                &["cooperate", "foo_bar", "a", "b"],
            ),
            (
                "Đặng Thị Ngọc Thịnh İstanbul",
                &["đặng", "thị", "ngọc", "thịnh", "i\u{307}stanbul"],
            ),
            ("… -- ?! \"\" : * () []", &[]),
            ("", &[]),
        ];
        for (text, expected) in cases {
            assert_eq!(&plain(text), expected, "{text:?}");
        }
    }

    /// The definition, step by step and without a short way.
    fn by_definition(text: &str) -> Vec<String> {
        let composed: String = text.chars().filter(|c| !is_ignorable(*c)).nfkc().collect();
        let folded: String = caseless::default_case_fold_str(&composed).nfkc().collect();
        let mut terms = Vec::new();
        let mut emit = |word: &str| terms.push(shorten(word).to_owned());
        let mut run = Run::default();
        for segment in folded.split_word_bounds() {
            cut_segment(segment, &mut run, &mut emit);
        }
        run.flush(&mut emit);
        terms
    }

    /// Pieces that meet at every kind of boundary: ASCII, marks, joiners, signs that hold words together,
    /// flags, scripts without spaces, what folds or composes into something longer.
    const PIECES: &str = "a b Z 0 9 _ . , ; : ' \" - / \t \n \r \u{b} \u{a0} \u{2003} \u{301} \u{93f} \u{345} \u{903} \u{200d} \
        \u{ad} \u{fe0f} é É ß İ ſ K ﬁ ㍿ Ａ １ ’ · … – × ½ ² 🚀 👩 🏽 🇫 🇷 ❤ 山 北 の ー カ ﾊ ﾞ 전 ᄒ ᅡ ᆫ ก ำ ๕ ភ ្ ם \u{5f3} ' ا \u{660} ख ्";

    proptest! {
        #[test]
        fn short_ways_lead_to_the_same_terms(
            pieces in prop::collection::vec(
                prop_oneof![
                    3 => prop::sample::select(PIECES.split(' ').collect::<Vec<_>>()),
                    2 => Just(" "),
                    1 => prop::sample::select(vec!["word", "Two words", " x", "3.14", "l'h", "e.g."]),
                ],
                0..40,
            ),
        ) {
            let text = pieces.concat();
            let expected = by_definition(&text);
            prop_assert_eq!(plain(&text), expected.clone(), "{:?}", text);
            let mut analyser = Analyser { stem_english: false };
            let mut stream = analyser.token_stream(&text);
            let mut streamed = Vec::new();
            while stream.advance() {
                streamed.push(stream.token().text.clone());
            }
            prop_assert_eq!(streamed, expected);
        }

        #[test]
        fn any_text_has_the_terms_of_the_definition(text in "\\PC{0,60}") {
            prop_assert_eq!(plain(&text), by_definition(&text));
        }

        #[test]
        fn chunks_are_the_text(text in "[ab é\u{301} ]{0,30}") {
            prop_assert_eq!(chunks(&text).collect::<String>(), text);
        }
    }

    #[test]
    fn stemming_is_optional() {
        let stemmed = Analyser { stem_english: true }.terms("Running relational cities 北京市");
        assert_eq!(stemmed, ["run", "relat", "citi", "北京", "京市"]);
        assert_eq!(plain("Running"), ["running"]);
    }

    #[test]
    fn long_terms_are_cut_at_a_character() {
        let terms = plain(&"é".repeat(400));
        assert_eq!(terms.len(), 1);
        assert_eq!(terms[0], "é".repeat(127));
    }

    #[test]
    fn unknown_names_are_refused() {
        let named = |name: &str, stemmer: Option<&str>| {
            Analyser::new(&AnalyserSpec {
                name: name.into(),
                stemmer: stemmer.map(str::to_owned),
            })
        };
        assert!(named(UNICODE_V1, None).is_ok());
        assert!(named("unicode-v2", None).is_err());
        assert!(named(UNICODE_V1, Some("klingon")).is_err());
    }
}
