//! Generation with a cache against computing everything again for every token.

use crate::support::*;
use engine::Sampling;
use qwen3::{Completion, Finish, Generation, Prompt, generate};

fn prompts() -> Vec<Vec<u32>> {
    let prompt = |seed: u32, len: u32| (0..len).map(|i| (seed + 5 * i * i) % 61).collect();
    [(1, 5), (2, 1), (3, 70), (4, 12), (5, 30), (6, 2), (7, 9)]
        .map(|(seed, len)| prompt(seed, len))
        .to_vec()
}

fn run(
    twins: &Twins,
    sampling: Sampling,
    slots: usize,
    stop_ids: &[u32],
    order: &[usize],
) -> Vec<Completion> {
    let texts = prompts();
    let prompts: Vec<_> = order
        .iter()
        .map(|&i| Prompt {
            number: i as u32,
            ids: &texts[i],
        })
        .collect();
    let how = Generation {
        sampling,
        max_new_tokens: 20,
        stop_ids,
        slots,
    };
    let mut heard = Vec::new();
    let replies = generate(&twins.model, Some(twins.lora()), &prompts, &how, |n| {
        heard.push(n)
    });
    assert_eq!(heard.last(), Some(&order.len()));
    assert!(heard.is_sorted());
    replies.unwrap()
}

/// The most likely next token by the oracle, recomputed from the first token on.
fn oracle_greedy(twins: &Twins, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut ids = prompt.to_vec();
    for _ in 0..count {
        let labelled = vec![false; ids.len()];
        let batch = oracle_batch(&[(ids.clone(), labelled)]);
        let logits = floats(
            &twins
                .oracle
                .logits(&batch, Some(&twins.oracle_lora))
                .unwrap(),
        );
        let last = &logits[logits.len() - 61..];
        let best = (0..61)
            .max_by(|&a, &b| last[a].total_cmp(&last[b]))
            .unwrap();
        ids.push(best as u32);
    }
    ids.split_off(prompt.len())
}

#[test]
fn greedy_replies_are_the_oracles() {
    let twins = Twins::new(true, 3);
    let all: Vec<usize> = (0..prompts().len()).collect();
    let replies = run(&twins, Sampling::GREEDY, 3, &[], &all);
    for (prompt, reply) in prompts().iter().zip(&replies) {
        assert_eq!(reply.finish, Finish::Length);
        assert_eq!(reply.ids, oracle_greedy(&twins, prompt, 20));
    }
}

#[test]
fn a_stop_token_ends_a_reply_and_is_not_part_of_it() {
    let twins = Twins::new(true, 3);
    let free = run(&twins, Sampling::GREEDY, 3, &[], &[0, 3, 4]);
    let stop = free[1].ids[4];
    let stopped = run(&twins, Sampling::GREEDY, 2, &[stop], &[0, 3, 4]);
    for (free, stopped) in free.iter().zip(stopped) {
        match free.ids.iter().position(|&id| id == stop) {
            None => assert_eq!(stopped, *free),
            Some(end) => {
                assert_eq!(stopped.ids, free.ids[..end]);
                assert_eq!(stopped.finish, Finish::Stop);
            }
        }
    }
}

#[test]
fn neighbours_do_not_change_a_sampled_reply() {
    let twins = Twins::new(true, 3);
    let sampling = Sampling {
        temperature: 0.9,
        top_k: 20,
        top_p: 0.95,
        seed: 4,
    };
    let all = run(&twins, sampling, 7, &[], &[0, 1, 2, 3, 4, 5, 6]);
    let few = run(&twins, sampling, 2, &[], &[6, 2, 3]);
    assert_eq!(few, [all[6].clone(), all[2].clone(), all[3].clone()]);
    let other = Sampling {
        seed: 5,
        ..sampling
    };
    assert_ne!(all, run(&twins, other, 7, &[], &[0, 1, 2, 3, 4, 5, 6]));
}

#[test]
fn the_models_last_position_ends_a_reply() {
    let twins = Twins::new(true, 3);
    let limit = twins.model.config().max_positions;
    let ids: Vec<u32> = (0..limit as u32 - 3).map(|i| i % 61).collect();
    let prompt = Prompt {
        number: 0,
        ids: &ids,
    };
    let how = Generation {
        sampling: Sampling::GREEDY,
        max_new_tokens: 20,
        stop_ids: &[],
        slots: 1,
    };
    let replies = generate(&twins.model, None, &[prompt], &how, |_| {}).unwrap();
    assert_eq!(
        (replies[0].ids.len(), replies[0].finish),
        (3, Finish::Length)
    );
}
