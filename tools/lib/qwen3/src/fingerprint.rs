//! Names for exact contents: what a figure's signature and a resumed run are
//! compared by.

/// Bytes in lower-case hex.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
