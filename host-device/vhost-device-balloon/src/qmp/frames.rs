// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Splits a byte stream into JSON objects.
//!
//! QMP is not line-oriented: objects follow each other with or without white space, and may span lines. This module
//! finds only the extent of an object, by its braces and strings. The JSON parser validates the object.

use std::io::{self, BufRead, BufReader, Read};

use thiserror::Error;

/// The longest command, in bytes.
pub const MAX_FRAME: usize = 64 * 1024;

/// Why no object was returned.
#[derive(Debug, Error)]
pub enum FrameError {
    /// The input does not begin with a brace. It was skipped up to the end of its line.
    #[error("expecting an object")]
    Garbage,
    /// The object is too long. The rest of the stream is unusable.
    #[error("command is longer than {MAX_FRAME} bytes")]
    TooLong,
    /// The stream failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Reads JSON objects from a stream.
#[derive(Debug)]
pub struct Frames<R> {
    stream: BufReader<R>,
    /// The part of the object that was read.
    frame: Vec<u8>,
    /// Whether the rest of the line is skipped.
    garbage: bool,
    /// Open braces and brackets.
    depth: usize,
    string: bool,
    escaped: bool,
}

impl<R: Read> Frames<R> {
    /// Creates a reader of `stream`.
    pub fn new(stream: R) -> Self {
        Self {
            stream: BufReader::new(stream),
            frame: Vec::new(),
            garbage: false,
            depth: 0,
            string: false,
            escaped: false,
        }
    }

    /// Returns the bytes of the next object, or `None` at the end of the stream. An incomplete object at
    /// the end is ignored.
    ///
    /// # Errors
    ///
    /// See [`FrameError`]. After an error of a stream that would block, another call continues.
    pub fn next(&mut self) -> Result<Option<Vec<u8>>, FrameError> {
        let Self {
            stream,
            frame,
            garbage,
            depth,
            string,
            escaped,
        } = self;
        loop {
            let bytes = match stream.fill_buf() {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                other => other?,
            };
            if bytes.is_empty() {
                return if std::mem::take(garbage) {
                    Err(FrameError::Garbage)
                } else {
                    Ok(None)
                };
            }
            let mut used = 0;
            let mut complete = false;
            for byte in bytes {
                used += 1;
                if frame.is_empty() {
                    match byte {
                        b'\n' if *garbage => {
                            *garbage = false;
                            stream.consume(used);
                            return Err(FrameError::Garbage);
                        }
                        _ if *garbage || byte.is_ascii_whitespace() => continue,
                        b'{' => {}
                        _ => {
                            *garbage = true;
                            continue;
                        }
                    }
                }
                if frame.len() == MAX_FRAME {
                    return Err(FrameError::TooLong);
                }
                frame.push(*byte);
                match (*string, *escaped, byte) {
                    (true, true, _) => *escaped = false,
                    (true, false, b'\\') => *escaped = true,
                    (_, false, b'"') => *string = !*string,
                    (false, _, b'{' | b'[') => *depth += 1,
                    (false, _, b'}' | b']') => *depth = depth.saturating_sub(1),
                    _ => {}
                }
                if *depth == 0 {
                    complete = true;
                    break;
                }
            }
            stream.consume(used);
            if complete {
                return Ok(Some(std::mem::take(frame)));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all(input: &[u8]) -> Vec<Result<String, FrameError>> {
        let mut frames = Frames::new(input);
        let mut found = Vec::new();
        loop {
            match frames.next() {
                Ok(None) => return found,
                Ok(Some(frame)) => {
                    found.push(Ok(frame.iter().map(|byte| char::from(*byte)).collect()))
                }
                Err(error) => {
                    let last = matches!(error, FrameError::TooLong);
                    found.push(Err(error));
                    if last {
                        return found;
                    }
                }
            }
        }
    }

    #[test]
    fn objects_need_no_lines() {
        let found: Vec<_> = all(b" {\"a\":\n{\"b\":[1]}}{\"c\":\"}{\\\"\"}\r\n\r\n{} {\"cut")
            .into_iter()
            .map(Result::unwrap)
            .collect();
        assert_eq!(found, ["{\"a\":\n{\"b\":[1]}}", "{\"c\":\"}{\\\"\"}", "{}"]);
    }

    /// Gives one byte at a time, and blocks before each.
    struct Slow<'a>(&'a [u8], bool);

    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.1 = !self.1;
            if self.1 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            let byte = buffer.len().min(1);
            self.0.read(&mut buffer[..byte])
        }
    }

    #[test]
    fn a_stream_that_blocks_in_an_object_is_continued() {
        let mut frames = Frames::new(Slow(b"x\n {\"a\":\"}\\\"\"}{}", false));
        let (mut found, mut garbage, mut blocked) = (Vec::new(), 0, 0);
        loop {
            match frames.next() {
                Ok(Some(frame)) => found.push(frame),
                Ok(None) => break,
                Err(FrameError::Garbage) => garbage += 1,
                Err(FrameError::Io(error)) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    blocked += 1;
                }
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(found, [b"{\"a\":\"}\\\"\"}".to_vec(), b"{}".to_vec()]);
        assert_eq!((garbage, blocked), (1, 17));
    }

    #[test]
    fn garbage_ends_with_its_line() {
        let found = all(b"hello {\"a\":1}\n{\"b\":2}\n17");
        assert!(matches!(found[0], Err(FrameError::Garbage)));
        assert_eq!(*found[1].as_ref().unwrap(), "{\"b\":2}");
        assert!(matches!(found[2], Err(FrameError::Garbage)));
    }

    #[test]
    fn oversized_objects_are_refused() {
        let mut input = b"{\"a\":\"".to_vec();
        input.resize(MAX_FRAME + 1, b'x');
        assert!(matches!(all(&input)[..], [Err(FrameError::TooLong)]));
    }

    proptest! {
        #[test]
        fn any_bytes_come_to_an_end(input in prop::collection::vec(prop_oneof![
            any::<u8>(), Just(b'{'), Just(b'}'), Just(b'"'), Just(b'\\'), Just(b'\n')], 0..300)) {
            let frames: usize = all(&input).iter().filter_map(|frame| frame.as_ref().ok()).map(|frame| frame.chars().count()).sum();
            prop_assert!(frames <= input.len());
        }
    }
}
