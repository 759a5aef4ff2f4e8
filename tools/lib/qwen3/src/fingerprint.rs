//! Names for exact contents: what a figure's signature and a resumed run are
//! compared by.

use rayon::prelude::*;
use sha2::{Digest, Sha256};

/// Bytes that one thread hashes at a time.
const PIECE: usize = 16 << 20;

/// Bytes in lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// SHA-256 over the SHA-256 of each 16 MiB: weights are too long for one thread
/// to hash at every start.
pub(crate) fn digest(bytes: &[u8]) -> [u8; 32] {
    let pieces: Vec<_> = bytes.par_chunks(PIECE).map(Sha256::digest).collect();
    Sha256::digest(pieces.concat()).into()
}
