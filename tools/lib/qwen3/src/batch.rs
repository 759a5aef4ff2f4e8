//! Rows of token ids on their way through the model, packed.

use engine::{Backend, Ragged, Result};

/// One conversation as the model sees it.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    /// Its number in the data: keys its dropout masks, whatever it is packed with.
    pub number: u32,
    /// Its tokens.
    pub ids: &'a [u32],
    /// Whether each token is to be predicted, from those before it; the first
    /// never is. As long as `ids`.
    pub labelled: &'a [bool],
}

/// Rows end to end on the device, with what is to be predicted.
pub struct Batch<B: Backend> {
    pub(crate) rows: Ragged<B>,
    pub(crate) ids: B::Ids,
    /// Indices of the tokens that predict, and what each should.
    pub(crate) sources: B::Ids,
    pub(crate) targets: B::Ids,
    /// Their rows and positions, as [`Ragged`] has them of all tokens.
    pub(crate) source_rows: B::Ids,
    pub(crate) source_positions: B::Ids,
    labels: Vec<usize>,
}

impl<B: Backend> Batch<B> {
    /// Packs rows in the given order.
    ///
    /// # Errors
    /// If the device has no room.
    ///
    /// # Panics
    /// If a row is empty or its mask has another length.
    pub fn new(backend: &B, rows: &[Row<'_>]) -> Result<Self> {
        let (mut ids, mut sources, mut targets) = (Vec::new(), Vec::new(), Vec::new());
        let (mut source_rows, mut source_positions) = (Vec::new(), Vec::new());
        let mut labels = Vec::with_capacity(rows.len());
        for row in rows {
            assert!(!row.ids.is_empty(), "row {} is empty", row.number);
            assert_eq!(
                row.ids.len(),
                row.labelled.len(),
                "mask of row {}",
                row.number
            );
            let before = targets.len();
            for (i, _) in row.labelled.iter().enumerate().skip(1).filter(|(_, l)| **l) {
                sources.push((ids.len() + i - 1) as u32);
                source_rows.push(row.number);
                source_positions.push(i as u32 - 1);
                targets.push(row.ids[i]);
            }
            labels.push(targets.len() - before);
            ids.extend_from_slice(row.ids);
        }
        let lengths: Vec<_> = rows.iter().map(|r| (r.number, r.ids.len())).collect();
        Ok(Self {
            rows: Ragged::new(backend, &lengths)?,
            ids: backend.upload_ids(&ids)?,
            sources: backend.upload_ids(&sources)?,
            targets: backend.upload_ids(&targets)?,
            source_rows: backend.upload_ids(&source_rows)?,
            source_positions: backend.upload_ids(&source_positions)?,
            labels,
        })
    }

    /// Tokens in all rows together.
    pub fn tokens(&self) -> usize {
        self.rows.tokens()
    }

    /// Tokens to be predicted, over all rows.
    pub fn labelled(&self) -> usize {
        self.labels.iter().sum()
    }

    /// Tokens to be predicted, row by row.
    pub fn labels(&self) -> &[usize] {
        &self.labels
    }

    /// `[tokens, predictions, longest row]`: what the buffers must hold.
    pub(crate) fn size(&self) -> [usize; 3] {
        [self.tokens(), self.labelled(), self.rows.longest()]
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use engine::Cpu;

    use super::*;

    #[test]
    fn tokens_that_predict_are_keyed_like_all_tokens() {
        let ids: Vec<u32> = (0..9).collect();
        let labelled = [false, true, false, false, true, true, false, true, true];
        let row = |number, len: usize| Row {
            number,
            ids: &ids[..len],
            labelled: &labelled[..len],
        };
        let batch = Batch::new(&Cpu, &[row(7, 6), row(3, 9)]).unwrap();
        assert_eq!(batch.sources, [0, 3, 4, 6, 9, 10, 12, 13]);
        let of_all = |all: &[u32]| -> Vec<u32> {
            let at = batch.sources.iter().map(|&at| all[at as usize]);
            at.collect()
        };
        assert_eq!(batch.source_rows, of_all(&batch.rows.rows));
        assert_eq!(batch.source_positions, of_all(&batch.rows.positions));
    }
}
