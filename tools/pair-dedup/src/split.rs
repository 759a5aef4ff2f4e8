//! Which rows are held out: whole groups, chosen by a seeded hash of their name.
//!
//! A group is what a model could have learnt the answer from: rows of one thread, rows
//! whose tweets are near, and rows with the same reply. The hash hangs on the group alone, so new rows
//! move only few old ones from one side to the other.

use record::Split;
use sha2::{Digest, Sha256};

/// A group of rows that stay on one side.
pub struct Group {
    /// Its name: the least conversation id in it.
    pub name: String,
    /// Its rows.
    pub rows: Vec<usize>,
}

/// Gives each of `rows` rows its side. Groups are held out in the order of their
/// hashes while they fit, until `fraction` of the rows are. A group of more than
/// a tenth of that is held out only where the others do not suffice: evaluation
/// should not be about one conversation.
pub fn split(groups: &[Group], rows: usize, fraction: f64, seed: u64) -> Vec<Split> {
    let target = (rows as f64 * fraction).round() as usize;
    let mut order: Vec<(bool, u64, &Group)> = groups
        .iter()
        .map(|group| {
            (
                group.rows.len() > (target / 10).max(1),
                hash(seed, &group.name),
                group,
            )
        })
        .collect();
    order.sort_by(|a, b| (a.0, a.1, &a.2.name).cmp(&(b.0, b.1, &b.2.name)));

    let mut sides = vec![Split::Train; rows];
    let mut hold_out = |group: &Group| group.rows.iter().for_each(|&row| sides[row] = Split::Eval);
    let mut left = target;
    let mut closest: Option<&Group> = None;
    for (_, _, group) in order {
        if group.rows.len() <= left {
            hold_out(group);
            left -= group.rows.len();
        } else if closest.is_none_or(|closest| group.rows.len() < closest.rows.len()) {
            closest = Some(group);
        }
    }
    // One group too many where that is nearer to the fraction than one too few.
    if let Some(group) = closest.filter(|group| group.rows.len() - left < left) {
        hold_out(group);
    }
    sides
}

fn hash(seed: u64, name: &str) -> u64 {
    let digest = Sha256::new()
        .chain_update(seed.to_le_bytes())
        .chain_update(name)
        .finalize();
    digest
        .iter()
        .take(8)
        .fold(0, |hash, &byte| hash << 8 | u64::from(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Groups of the given sizes, with names that do not depend on the others.
    fn groups(sizes: &[usize]) -> (Vec<Group>, usize) {
        let mut next = 0;
        let groups = sizes.iter().enumerate().map(|(i, &size)| {
            next += size;
            Group {
                name: format!("thread-{i}"),
                rows: (next - size..next).collect(),
            }
        });
        (groups.collect(), sizes.iter().sum())
    }

    fn held_out(sizes: &[usize], fraction: f64, seed: u64) -> (Vec<Split>, usize) {
        let (groups, rows) = groups(sizes);
        let sides = split(&groups, rows, fraction, seed);
        for group in &groups {
            assert!(
                group
                    .rows
                    .iter()
                    .all(|&row| sides[row] == sides[group.rows[0]]),
                "a group is cut"
            );
        }
        let count = sides.iter().filter(|&&side| side == Split::Eval).count();
        (sides, count)
    }

    #[test]
    fn the_fraction_is_met_as_closely_as_groups_allow() {
        for seed in 0..20 {
            assert_eq!(held_out(&[1; 1000], 0.1, seed).1, 100);
            assert_eq!(held_out(&[3; 100], 0.1, seed).1, 30);
            assert_eq!(
                held_out(&[500, 1, 1, 1], 0.1, seed).1,
                3,
                "the giant would be ten times too much"
            );
            assert_eq!(
                held_out(&[7, 7, 7], 1.0 / 3.0, seed).1,
                7,
                "large ones are taken where there are no others"
            );
            let of_four = |fraction| held_out(&[4; 20], fraction, seed).1;
            assert_eq!(
                of_four(0.14),
                12,
                "11 are wanted: one too many is nearer than three too few"
            );
            assert_eq!(
                of_four(0.12),
                8,
                "10 are wanted: of two equally near the smaller"
            );
            assert_eq!(held_out(&[5; 9], 0.0, seed).1, 0);
            assert_eq!(held_out(&[5; 9], 1.0, seed).1, 45);
            assert_eq!(held_out(&[], 0.1, seed).1, 0);
        }
    }

    #[test]
    fn new_rows_move_few_old_ones() {
        let (before, _) = held_out(&[1; 1000], 0.1, 42);
        let (after, _) = held_out(&[1; 1100], 0.1, 42);
        let moved = before.iter().zip(&after).filter(|(a, b)| a != b).count();
        assert!(moved <= 15, "{moved} of 1000 changed sides");
        let (other, _) = held_out(&[1; 1000], 0.1, 43);
        let moved = before.iter().zip(&other).filter(|(a, b)| a != b).count();
        assert!(moved > 100, "another seed is another choice, {moved}");
    }
}
