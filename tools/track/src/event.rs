//! TensorBoard's event files: records of a length, a checksum, and an `Event` in protobuf.
//!
//! Written by hand. Of the format these are a dozen fields, all written and none read, in
//! fewer lines than a code generator's settings; and a checksum of some dozen bytes a line
//! needs no crate that makes it fast.
//!
//! Source: tensorflow/core/lib/io/record_writer.cc; event.proto, summary.proto and tensor.proto
//! in tensorboard/compat/proto.

use serde_json::{Map, Value};

use crate::figures::{Line, shown};
use crate::spool::{Entry, Head};

/// The file's first record.
pub fn first(head: &Head) -> Vec<u8> {
    let mut event = Message::default();
    event.double(1, seconds(head.began));
    event.bytes(3, b"brain.Event:2");
    record(&event.0)
}

/// The record of an entry. `last` is the time of the line before it, which settings take.
pub fn of(entry: &Entry, last: u64) -> Vec<u8> {
    let (at, step, summary) = match entry {
        Entry::Line(line) => (line.at, line.step, scalars(line)),
        Entry::Settings(settings) => (last, 0, table(settings)),
    };
    let mut event = Message::default();
    event.double(1, seconds(at));
    event.whole(2, step);
    event.bytes(5, &summary.0);
    record(&event.0)
}

fn seconds(milliseconds: u64) -> f64 {
    milliseconds as f64 / 1000.0
}

/// A `Summary` of simple values, which TensorBoard holds in 32 bits, as it does all scalars.
fn scalars(line: &Line) -> Message {
    let mut summary = Message::default();
    for (name, figure) in &line.figures {
        let mut value = Message::default();
        value.bytes(1, name.as_bytes());
        value.float(2, figure.as_f64().unwrap_or(f64::NAN) as f32);
        summary.bytes(1, &value.0);
    }
    summary
}

/// A `Summary` of one text in Markdown, for TensorBoard's text dashboard.
fn table(settings: &Map<String, Value>) -> Message {
    let mut text = String::from("| setting | value |\n|---|---|\n");
    for (key, value) in settings {
        let cell = |text: &str| text.replace('|', "\\|").replace('\n', " ");
        text.push_str(&format!("| {} | {} |\n", cell(key), cell(&shown(value))));
    }
    let mut plugin = Message::default();
    plugin.bytes(1, b"text");
    let mut metadata = Message::default();
    metadata.bytes(1, &plugin.0);
    let mut tensor = Message::default();
    tensor.whole(1, 7); // DT_STRING
    tensor.bytes(2, &[]); // a shape without dimensions
    tensor.bytes(8, text.as_bytes());
    let mut value = Message::default();
    value.bytes(1, b"settings");
    value.bytes(8, &tensor.0);
    value.bytes(9, &metadata.0);
    let mut summary = Message::default();
    summary.bytes(1, &value.0);
    summary
}

/// A protobuf message in its wire format.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value > 0x7f {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn tag(&mut self, field: u64, kind: u64) {
        self.varint(field << 3 | kind);
    }

    /// Nothing for 0, which is what a missing one means.
    fn whole(&mut self, field: u64, value: u64) {
        if value != 0 {
            self.tag(field, 0);
            self.varint(value);
        }
    }

    fn double(&mut self, field: u64, value: f64) {
        self.tag(field, 1);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u64, value: &[u8]) {
        self.tag(field, 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
    }

    fn float(&mut self, field: u64, value: f32) {
        self.tag(field, 5);
        self.0.extend(value.to_le_bytes());
    }
}

/// Length, its checksum, the data, its checksum.
fn record(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend(length);
    record.extend(masked(&length).to_le_bytes());
    record.extend(data);
    record.extend(masked(data).to_le_bytes());
    record
}

/// A checksum over data that holds checksums says little: TFRecord turns it and adds a number.
fn masked(data: &[u8]) -> u32 {
    crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (RFC 3720, appendix B.4), bit by bit.
fn crc32c(data: &[u8]) -> u32 {
    let mut crc = !0_u32;
    for &byte in data {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
        }
    }
    !crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_standard() {
        // RFC 3720, appendix B.4.
        let rising: Vec<u8> = (0..32).collect();
        let falling: Vec<u8> = (0..32).rev().collect();
        for (data, crc) in [
            (&[0; 32][..], 0x8a91_36aa),
            (&[0xff; 32], 0x62a8_ab43),
            (&rising, 0x46dd_794e),
            (&falling, 0x113f_db5c),
        ] {
            assert_eq!(crc32c(data), crc);
        }
    }
}
