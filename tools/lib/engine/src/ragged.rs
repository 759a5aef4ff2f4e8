//! Rows of different lengths, end to end, without padding.

use crate::{Backend, Result};

/// Which token of a packed buffer belongs to which row, and where in it.
///
/// Everything that must not depend on packing reads from here: attention stays
/// inside a row, rotary angles use the position in the row, and random masks
/// are keyed by the row's own number in the data.
pub struct Ragged<B: Backend> {
    bounds: Vec<usize>,
    /// `[rows + 1]` prefix sums of the lengths.
    pub bounds_on_device: B::Ids,
    /// `[tokens]` position of each token in its row, from 0.
    pub positions: B::Ids,
    /// `[tokens]` number of each token's row in the data.
    pub rows: B::Ids,
}

impl<B: Backend> Ragged<B> {
    /// Lays out rows given as `(number in the data, length)`.
    ///
    /// # Errors
    /// If the device has no room for the index buffers.
    pub fn new(backend: &B, rows: &[(u32, usize)]) -> Result<Self> {
        let mut bounds = vec![0];
        let (mut positions, mut owners) = (Vec::new(), Vec::new());
        for &(row, len) in rows {
            bounds.push(positions.len() + len);
            positions.extend(0..len as u32);
            owners.extend(std::iter::repeat_n(row, len));
        }
        let on_device: Vec<u32> = bounds.iter().map(|&b| b as u32).collect();
        Ok(Self {
            bounds_on_device: backend.upload_ids(&on_device)?,
            positions: backend.upload_ids(&positions)?,
            rows: backend.upload_ids(&owners)?,
            bounds,
        })
    }

    /// Tokens in all rows together.
    pub fn tokens(&self) -> usize {
        self.bounds[self.bounds.len() - 1]
    }

    /// `[rows + 1]` prefix sums of the lengths: row `i` is `bounds[i]..bounds[i + 1]`.
    pub fn bounds(&self) -> &[usize] {
        &self.bounds
    }

    /// Length of the longest row.
    pub fn longest(&self) -> usize {
        self.bounds
            .windows(2)
            .map(|w| w[1] - w[0])
            .max()
            .unwrap_or(0)
    }
}
