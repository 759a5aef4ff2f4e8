//! Where a figure came from, in one line: sacrebleu's idea, for every figure.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sha2::{Digest, Sha256};

/// `tool:gen-eval|version:0.1.0|seed:42|config:1f2e3d4c5b6a|…`
#[derive(Clone, Debug)]
pub struct Signature(String);

impl Signature {
    /// Begins with the tool and its version.
    pub fn new(tool: &str) -> Self {
        Self(format!("tool:{tool}|version:{}", env!("CARGO_PKG_VERSION")))
    }

    /// Adds a part.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl fmt::Display) -> Self {
        self.0.push_str(&format!("|{key}:{value}"));
        self
    }

    /// Adds the first 12 hexadecimal digits of a SHA-256.
    #[must_use]
    pub fn with_hash(self, key: &str, sha256: &str) -> Self {
        self.with(key, sha256.get(..12).unwrap_or(sha256))
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// SHA-256 of some bytes, in hexadecimal.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// SHA-256 of a file, in hexadecimal.
pub fn sha256_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..read]);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
