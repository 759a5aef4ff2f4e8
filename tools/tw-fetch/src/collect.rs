//! Collecting through Apify: one search, then the replies of what it found, a few
//! conversations at a time, until there are pairs enough, or nothing is left to ask
//! for, or the money is used up.
//!
//! What to do next follows from the state on disk alone. An interrupted collection
//! therefore goes on by itself, and a finished one needs neither network nor token.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context;
use cli::{App, Failure, Resolved};
use record::Record;
use serde_json::{Value, json};
use settings::{Collection, DataSettings};

use crate::apify::{self, Api, Limits, Run, Started};
use crate::join::{Joiner, Origin};
use crate::source::{self, Item};
use crate::state::{Event, Plan, State, Step};
use crate::tweet::{Dialect, Tweet};
use crate::wanted::Wanted;

/// How long an interrupted collection waits to hear that its run stops.
const FAREWELL: Duration = Duration::from_millis(1500);

/// Why a collection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Enough,
    NothingLeft,
    MoneyUsedUp,
}

/// Collects; what comes back holds every tweet fetched.
///
/// # Errors
/// Another plan than the folder's (exit 2), and whatever the service or the disk does.
pub fn collect(
    app: &App,
    resolved: &Resolved<DataSettings>,
    folder: &Path,
    adopt: Option<&str>,
    api: impl Fn() -> anyhow::Result<Api>,
    joiner: Joiner,
) -> anyhow::Result<Joiner> {
    let settings = &resolved.settings.collection;
    let wanted = Wanted::new(resolved)?;
    let mut state = State::open(folder)?;
    let plan = Plan {
        actor: settings.apify.actor.clone(),
        search_queries: settings.search_queries.clone(),
        search_items: settings.apify.search_items,
        sort: settings.apify.sort.clone(),
    };
    match &state.plan {
        // Where every start was refused, say for a mistyped actor, no plan holds anyone to it.
        Some(old) if *old != plan && !state.is_empty() => {
            return Err(other_plan(old, &plan, folder).into());
        }
        _ => {}
    }
    if plan.search_queries.is_empty() {
        return Err(Failure::Usage(
            "nothing to search for: give --query, or collection.search_queries in the configuration".into(),
        )
        .into());
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    // Made when first needed: what is on disk already asks nobody for a token.
    let make = || {
        let api = api()?;
        anyhow::Ok(Collector { app, settings, api })
    };
    let mut collector = None;
    if let Some((step, run)) = to_settle(&mut state, folder, adopt)? {
        let collector = collector.insert(make()?);
        runtime.block_on(collector.settle(&mut state, step, run))?;
    }
    let mut items = Items::new(joiner);
    loop {
        items.read(&state)?;
        let work = match next(settings, &wanted, &state, &items) {
            Next::Work(work) => work,
            Next::End(end) => {
                say_end(app, settings, &wanted, &state, &items, end);
                return Ok(items.all());
            }
        };
        let collector = match &mut collector {
            Some(collector) => collector,
            none => none.insert(make()?),
        };
        // From here on a signal no longer ends the process, but is looked for.
        if app.interrupted()? {
            return Err(interrupted());
        }
        let step = match work {
            Work::GoOn(step) => step,
            Work::Start(input, limits) => {
                if state.plan.as_ref() != Some(&plan) {
                    state.record(Event::Plan { plan: plan.clone() })?;
                }
                let step = state.steps.len();
                state.record(Event::Starting {
                    step,
                    input,
                    limits,
                })?;
                step
            }
        };
        runtime.block_on(collector.run(&mut state, step))?;
    }
}

/// What remains to be done.
enum Next {
    Work(Work),
    End(End),
}

enum Work {
    /// A run was begun: see it through.
    GoOn(usize),
    /// Begin one.
    Start(Value, Limits),
}

fn next(settings: &Collection, wanted: &Wanted, state: &State, items: &Items) -> Next {
    if let Some(open) = state.steps.iter().position(|step| !step.finished) {
        return Next::Work(Work::GoOn(open));
    }
    let pairs = items.joiner.pairs().filter(|pair| wanted.pair(pair));
    if pairs.count() as u64 >= settings.target_pairs {
        return Next::End(End::Enough);
    }
    let apify = &settings.apify;
    let left = apify.max_cost_usd - state.spent_usd();
    let affordable = if apify.price_per_1000_usd > 0.0 {
        // Saturates, which is what is meant.
        (left.max(0.0) / apify.price_per_1000_usd * 1000.0) as u64
    } else {
        u64::MAX
    };
    if affordable == 0 || left <= 0.0 {
        return Next::End(End::MoneyUsedUp);
    }
    let limits = |wanted: u64| Limits {
        max_items: wanted.min(affordable),
        max_usd: left,
    };
    if state.steps.is_empty() {
        let limits = limits(apify.search_items);
        return Next::Work(Work::Start(
            search_input(settings, limits.max_items),
            limits,
        ));
    }
    let batch = unasked(settings, wanted, items);
    if batch.is_empty() {
        return Next::End(End::NothingLeft);
    }
    let limits = limits(
        apify
            .replies_per_conversation
            .saturating_mul(batch.len() as u64),
    );
    let input = json!({"conversationIds": batch, "maxItems": limits.max_items, "sort": apify.sort});
    Next::Work(Work::Start(input, limits))
}

/// The actor's input for the search; its own filters save paying for what ours would refuse.
fn search_input(settings: &Collection, max_items: u64) -> Value {
    let filters = &settings.tweet_filters;
    json!({
        "searchTerms": settings.search_queries,
        "maxItems": max_items,
        "sort": settings.apify.sort,
        "tweetLanguage": filters.language,
        "minimumFavorites": filters.min_likes,
        // A tweet that nobody answered makes no pair.
        "minimumReplies": filters.min_replies.max(1),
        "includeSearchTerms": false,
    })
}

/// The next conversations to ask for: those with the most replies first, so that a
/// small budget goes where the pairs are. What a failed run left out comes before, and is
/// asked for by half as many at a time, for large batches are what fails.
fn unasked(settings: &Collection, wanted: &Wanted, items: &Items) -> Vec<String> {
    let asked = |tweet: &Tweet| items.asked.get(root(tweet)).copied();
    let mut open: Vec<&Tweet> = items
        .joiner
        .tweets()
        // Replies of conversations already asked for would lead there again.
        .filter(|tweet| !tweet.is_reply && tweet.replies != Some(0))
        .filter(|tweet| asked(tweet) != Some(Asked::Settled) && wanted.tweet(tweet))
        .collect();
    open.sort_by(|a, b| b.replies.cmp(&a.replies).then_with(|| a.id.cmp(&b.id)));
    let mut seen = HashSet::new();
    open.retain(|tweet| seen.insert(root(tweet)));
    let most = settings.apify.conversations_per_run.max(1);
    let left_out = open.iter().find_map(|tweet| asked(tweet));
    let most = match left_out {
        Some(Asked::LeftOut { of }) => most.min(of / 2).max(1),
        _ => most,
    };
    let open = open
        .into_iter()
        .filter(|tweet| asked(tweet).is_some() == left_out.is_some());
    open.map(|tweet| root(tweet).to_owned())
        .take(most)
        .collect()
}

/// The conversation that a tweet begins.
fn root(tweet: &Tweet) -> &str {
    tweet.conversation_id.as_deref().unwrap_or(&tweet.id)
}

/// How it stands with a conversation that was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asked {
    /// It is not asked for again: replies came, or a run that ended well found none, or it
    /// was the second time.
    Settled,
    /// The run failed, having asked for so many conversations, before it brought anything of this one.
    LeftOut { of: usize },
}

/// What the finished runs brought, each read once.
struct Items {
    joiner: Joiner,
    unreadable: Vec<(Record, String)>,
    /// How many runs have been read.
    steps: usize,
    asked: HashMap<String, Asked>,
}

impl Items {
    fn new(joiner: Joiner) -> Self {
        Self {
            joiner,
            unreadable: Vec::new(),
            steps: 0,
            asked: HashMap::new(),
        }
    }

    /// Takes in the runs that have finished since.
    fn read(&mut self, state: &State) -> anyhow::Result<()> {
        while state.steps.get(self.steps).is_some_and(|s| s.finished) {
            self.read_step(state, self.steps)?;
            self.steps += 1;
        }
        Ok(())
    }

    fn read_step(&mut self, state: &State, at: usize) -> anyhow::Result<()> {
        let step = &state.steps[at];
        let origin = Origin {
            source: "apify",
            collected_at: step.started_at.as_deref(),
        };
        let (joiner, unreadable) = (&mut self.joiner, &mut self.unreadable);
        // What was paid for is not given up because one item of it makes no sense.
        let bad = |line: &record::BadLine| {
            let record = Record::parse(&line.raw)
                .map_err(|e| Failure::Input(format!("{}:{}: {e}", line.file, line.line)))?;
            unreadable.push((record, line.error.clone()));
            Ok(())
        };
        let mut brought = HashSet::new();
        let mut no_limit = u64::MAX;
        if step.bytes > 0 {
            source::read(
                &state.items_path(at),
                Some(Dialect::Apify),
                &mut no_limit,
                bad,
                |row, _| {
                    match row.item {
                        Item::Tweet(tweet) => {
                            if !step.succeeded {
                                let parent = tweet.in_reply_to.as_deref();
                                let of = tweet.conversation_id.as_deref().or(parent);
                                brought.insert(of.unwrap_or(&tweet.id).to_owned());
                            }
                            joiner.add(*tweet, row.record, origin);
                        }
                        Item::Pair | Item::Nothing => joiner.refuse(row.record),
                    }
                    Ok(())
                },
            )?;
        }
        let of = step.conversations().count();
        for conversation in step.conversations() {
            let settled = step.succeeded || brought.contains(conversation);
            match self.asked.entry(conversation.to_owned()) {
                // Once more and no further: whatever fails on it would be paid for without end.
                Entry::Occupied(mut second) => drop(second.insert(Asked::Settled)),
                Entry::Vacant(first) => drop(first.insert(match settled {
                    true => Asked::Settled,
                    false => Asked::LeftOut { of },
                })),
            }
        }
        Ok(())
    }

    /// Everything, with what could not be read at its end.
    fn all(mut self) -> Joiner {
        for (record, cause) in self.unreadable {
            self.joiner.refuse_unreadable(record, cause);
        }
        self.joiner
    }
}

fn interrupted() -> anyhow::Error {
    Failure::Interrupted(
        "interrupted; what is fetched is kept, and the same command goes on".into(),
    )
    .into()
}

/// What the user says of the run that was begun last, where Apify must be asked about it. A
/// run that was asked for, and no answer on disk, may exist and cost money: only its owner
/// can find out. An id that is on disk may be the wrong one.
fn to_settle<'a>(
    state: &mut State,
    folder: &Path,
    adopt: Option<&'a str>,
) -> anyhow::Result<Option<(usize, Option<&'a str>)>> {
    let known = |step: usize| state.steps[step].run.is_some();
    match (state.begun(), adopt) {
        (Some(step), None) if !known(step) => Err(Failure::World(unknown_start(folder)).into()),
        (_, None) => Ok(None),
        (None, Some(_)) => Err(Failure::Usage(format!(
            "--adopt-run: {} knows of no run whose id it lacks, and of none that was begun and has no items yet",
            folder.display()
        ))
        .into()),
        (Some(step), Some("none")) if !known(step) => {
            state.record(Event::Refused { step })?;
            Ok(None)
        }
        (Some(step), Some(run)) => Ok(Some((step, Some(run).filter(|run| *run != "none")))),
    }
}

fn unknown_start(folder: &Path) -> String {
    format!(
        "{}: a run was asked for and its id never arrived, so one may be running and costing money: look at \
         https://console.apify.com/actors/runs, then run this again with --adopt-run ID, or --adopt-run none \
         if there is none",
        folder.display()
    )
}

fn other_plan(old: &Plan, new: &Plan, folder: &Path) -> Failure {
    let (old, new) = (json!(old), json!(new));
    let changed: Vec<String> = old
        .as_object()
        .into_iter()
        .flatten()
        .filter(|(key, value)| new.get(key.as_str()) != Some(value))
        .map(|(key, value)| format!("{key} was {value} and is {}", new[key]))
        .collect();
    Failure::Usage(format!(
        "{} holds a collection with other settings: {}; restore them, or collect into another --state (make: RUN=new)",
        folder.display(),
        changed.join("; ")
    ))
}

fn say_end(
    app: &App,
    settings: &Collection,
    wanted: &Wanted,
    state: &State,
    items: &Items,
    end: End,
) {
    let joiner = &items.joiner;
    let pairs = joiner.pairs().count();
    let passing = joiner.pairs().filter(|pair| wanted.pair(pair)).count();
    let target = settings.target_pairs;
    app.info(format_args!(
        "{pairs} pairs collected, {passing} of them pass the cheap filters (target {target}); {} runs, about ${:.2}",
        state.steps.len(),
        state.spent_usd()
    ));
    let mut fetched: HashMap<&str, u64> = HashMap::new();
    for tweet in joiner.tweets() {
        if let Some(conversation) = tweet.conversation_id.as_deref().filter(|_| tweet.is_reply) {
            *fetched.entry(conversation).or_default() += 1;
        }
    }
    let asked = &items.asked;
    let (mut got, mut there) = (0, 0);
    for tweet in joiner
        .tweets()
        .filter(|tweet| asked.contains_key(tweet.id.as_str()))
    {
        got += fetched.get(tweet.id.as_str()).copied().unwrap_or(0);
        there += tweet.replies.unwrap_or(0);
    }
    if !asked.is_empty() {
        app.info(format_args!(
            "{} conversations asked for: {got} replies fetched, where the tweets count {there}; X hides some and \
             ends long ones early",
            asked.len()
        ));
    }
    match end {
        End::Enough => {}
        End::NothingLeft => app.warn(
            "the target was not reached and no conversation is left to ask for: in a new --state, add queries or \
             raise collection.apify.search_items; or loosen the filters",
        ),
        End::MoneyUsedUp => app.warn(format_args!(
            "the target was not reached within collection.apify.max_cost_usd = {}: raise it and run this again to go on",
            settings.apify.max_cost_usd
        )),
    }
}

/// Whether `step` asks once more for what a failed run left out. It ends as it ends, or
/// conversations that no run gets through would bar the way to all others.
fn is_second(state: &State, step: usize) -> bool {
    let first = state.steps[step].conversations().next();
    let mut before = state.steps[..step].iter().flat_map(Step::conversations);
    first.is_some_and(|first| before.any(|conversation| conversation == first))
}

/// The part that talks to the service.
struct Collector<'a> {
    app: &'a App,
    settings: &'a Collection,
    api: Api,
}

impl Collector<'_> {
    /// Sees the run of `step` through, wherever it stands.
    async fn run(&self, state: &mut State, step: usize) -> anyhow::Result<()> {
        let run = match state.steps[step].run.clone() {
            None => self.start(state, step).await?,
            Some(id) => self.go_on(state, step, &id).await?,
        };
        let run = self.wait(state, step, run).await?;
        if run.status != "SUCCEEDED" {
            self.app.warn(format_args!(
                "the run {} ended as {}; what it fetched is taken",
                run.id,
                run.verdict()
            ));
        }
        let items = self.fetch(state, step, &run).await?;
        self.finish(state, step, &run, items).await
    }

    /// A run of an earlier process; one that we had stopped is set going again.
    async fn go_on(&self, state: &mut State, step: usize, id: &str) -> anyhow::Result<Run> {
        let look = self.unless_interrupted(self.api.look(id)).await;
        let remedy = match state.begun() {
            Some(_) => "--adopt-run names another, or `none`",
            None => "then begin with another --state",
        };
        let run = look.with_context(|| {
            format!("going on with the run {id} (Apify deletes old runs: {remedy})")
        })?;
        let run = run.ok_or_else(interrupted)?;
        if !state.steps[step].interrupted || state.steps[step].bytes > 0 {
            return Ok(run);
        }
        let run = self.wait(state, step, run).await?;
        if run.status != "ABORTED" {
            return Ok(run);
        }
        self.app.info(format_args!(
            "the run {id} was stopped last time; it goes on"
        ));
        match self.seen_through(self.api.resurrect(id)).await? {
            Ok(run) => Ok(run),
            Err(error) => {
                // The answer may be what failed: then a repeated request is refused because
                // the run goes on already, and costs money.
                let now = self.unless_interrupted(self.api.look(id)).await?;
                let now = now.ok_or_else(interrupted)?;
                if now.is_over() {
                    self.app
                        .warn(format_args!("the run {id} cannot go on: {error:#}"));
                }
                Ok(now)
            }
        }
    }

    /// Takes the user's word for which run `step` is (`None`: there is none), once Apify has
    /// been asked: what is on record of a paid collection should not be a mistyped id.
    async fn settle(
        &self,
        state: &mut State,
        step: usize,
        run: Option<&str>,
    ) -> anyhow::Result<()> {
        let Some(id) = run else {
            return self.give_up(state, step).await;
        };
        let wrong = |cause: &str| Failure::Usage(format!("--adopt-run {id}: {cause}"));
        if let Some(other) = state.steps[..step]
            .iter()
            .position(|step| step.run.as_deref() == Some(id))
        {
            let cause = format!("this is run {} of the collection already", other + 1);
            return Err(wrong(&cause).into());
        }
        let run = match self.unless_interrupted(self.api.look(id)).await {
            Err(error) if apify::is_hidden(&error) => {
                let cause = format!("Apify shows no such run ({error:#}); is it the id of a run?");
                return Err(wrong(&cause).into());
            }
            run => run?.ok_or_else(interrupted)?,
        };
        if !self.is_ours(&run).await? {
            let cause = format!("it is a run of another actor than {}", self.actor());
            return Err(wrong(&cause).into());
        }
        state.record(Event::Started {
            step,
            run: run.id,
            dataset: run.default_dataset_id,
            at: run.started_at,
        })
    }

    /// The run on record is not to be gone on with; if it is there, what it cost counts.
    async fn give_up(&self, state: &mut State, step: usize) -> anyhow::Result<()> {
        let id = state.steps[step].run.clone().context("a run without id")?;
        let run = match self.unless_interrupted(self.api.look(&id)).await {
            Err(error) if apify::is_hidden(&error) => None,
            run => Some(run?.ok_or_else(interrupted)?),
        };
        let run = match run {
            Some(run) if self.is_ours(&run).await? => run,
            _ => return state.record(Event::Refused { step }),
        };
        let usd = run.usage_total_usd.unwrap_or(0.0);
        self.app.warn(format_args!(
            "the run {id} ({}) is given up with what it fetched; the ${usd:.2} that it cost so far count",
            run.status
        ));
        state.record(Event::Failed {
            step,
            status: run.status,
            usd,
        })
    }

    /// Whether it is a run of the collection's actor, as far as Apify tells.
    async fn is_ours(&self, run: &Run) -> anyhow::Result<bool> {
        let Some(of) = run.act_id.as_ref().filter(|id| *id != self.actor()) else {
            return Ok(true);
        };
        match self.unless_interrupted(self.api.actor(self.actor())).await {
            Err(error) if apify::is_hidden(&error) => {
                self.app.warn(format_args!(
                    "whether {} is a run of {} cannot be told: {error:#}",
                    run.id,
                    self.actor()
                ));
                Ok(true)
            }
            actor => Ok(actor?.ok_or_else(interrupted)? == *of),
        }
    }

    fn actor(&self) -> &str {
        &self.settings.apify.actor
    }

    async fn start(&self, state: &mut State, step: usize) -> anyhow::Result<Run> {
        let (input, limits) = {
            let step = &state.steps[step];
            (
                step.input.clone(),
                step.limits.context("a step without limits")?,
            )
        };
        let what = match state.steps[step].conversations().count() {
            0 => "search".to_owned(),
            n => format!("replies of {n} conversations"),
        };
        self.app.info(format_args!(
            "run {}: {what}, at most {} items and ${:.2}",
            step + 1,
            limits.max_items,
            limits.max_usd
        ));
        let start = self.api.start(self.actor(), &input, limits);
        match self.seen_through(start).await? {
            Ok(run) => {
                state.record(Event::Started {
                    step,
                    run: run.id.clone(),
                    dataset: run.default_dataset_id.clone(),
                    at: run.started_at.clone(),
                })?;
                Ok(run)
            }
            Err(Started::Refused(error)) => {
                state.record(Event::Refused { step })?;
                Err(if self.app.interrupted()? {
                    interrupted()
                } else {
                    error
                })
            }
            Err(Started::Unknown(error)) => {
                let said = format!("{error:#}");
                Err(
                    Failure::World(format!("{said}\n--state {}", unknown_start(state.folder())))
                        .into(),
                )
            }
        }
    }

    /// Waits for the run to end. Interrupted, it asks the run to stop first.
    async fn wait(&self, state: &mut State, step: usize, mut run: Run) -> anyhow::Result<Run> {
        let progress = self.app.progress("waiting for Apify, seconds", None);
        let begun = Instant::now();
        while !run.is_over() {
            let asked = Instant::now();
            let Some(now) = self.unless_interrupted(self.api.wait(&run.id)).await? else {
                drop(progress);
                return Err(self.stop(state, step, &run.id).await);
            };
            run = now;
            progress.set(begun.elapsed().as_secs());
            // The service waits up to a minute itself; one that answers at once is not pestered.
            let pause = Duration::from_secs(1).saturating_sub(asked.elapsed());
            if !run.is_over() {
                let pause = async {
                    tokio::time::sleep(pause).await;
                    anyhow::Ok(())
                };
                self.unless_interrupted(pause).await?;
            }
        }
        Ok(run)
    }

    async fn stop(&self, state: &mut State, step: usize, run: &str) -> anyhow::Error {
        self.app
            .info(format_args!("interrupted: asking the run {run} to stop"));
        let stopped = match state.record(Event::Interrupted { step }) {
            Ok(()) => {
                // Once, and soon: whoever interrupts does not want to wait for this either.
                self.api.give_up();
                match tokio::time::timeout(FAREWELL, self.api.abort(run)).await {
                    Ok(answer) => answer,
                    Err(_) => Err(anyhow::anyhow!(
                        "no answer for {} s",
                        FAREWELL.as_secs_f64()
                    )),
                }
            }
            Err(error) => Err(error),
        };
        let how = match stopped {
            Ok(_) => format!("the run {run} was asked to stop"),
            Err(error) => format!(
                "the run {run} may still be running ({error:#}); see https://console.apify.com"
            ),
        };
        Failure::Interrupted(format!(
            "interrupted; {how}; the same command goes on from here"
        ))
        .into()
    }

    /// Fetches what is not on disk yet; the number of items in all.
    async fn fetch(&self, state: &mut State, step: usize, run: &Run) -> anyhow::Result<u64> {
        let dataset = run
            .default_dataset_id
            .clone()
            .or_else(|| state.steps[step].dataset.clone());
        let dataset = dataset.with_context(|| format!("the run {} names no dataset", run.id))?;
        let limit = self.settings.apify.page_size.max(1);
        let progress = self.app.progress("items", None);
        loop {
            let offset = state.steps[step].next_offset;
            let page = self
                .unless_interrupted(self.api.page(&dataset, offset, limit))
                .await?;
            let page = page.ok_or_else(interrupted)?;
            let bytes = state.append(step, &page.lines)?;
            // By what was asked for, not by what came: empty items are left out of a page.
            let next_offset = offset.saturating_add(limit);
            state.record(Event::Page {
                step,
                next_offset,
                bytes,
            })?;
            progress.set(
                page.total
                    .map_or(next_offset, |total| total.min(next_offset)),
            );
            let more = page
                .total
                .map_or(!page.lines.trim().is_empty(), |total| next_offset < total);
            if !more {
                break;
            }
        }
        let mut items = 0;
        for line in BufReader::new(std::fs::File::open(state.items_path(step))?).lines() {
            items += u64::from(!line?.trim().is_empty());
        }
        Ok(items)
    }

    /// Books what the run cost and whether it was of use.
    async fn finish(
        &self,
        state: &mut State,
        step: usize,
        run: &Run,
        items: u64,
    ) -> anyhow::Result<()> {
        // Figures settle some seconds after the end, so the count of items has a say.
        let settled = match self.unless_interrupted(self.api.look(&run.id)).await {
            Ok(now) => now.ok_or_else(interrupted)?,
            Err(_) => run.clone(),
        };
        let counted = items as f64 / 1000.0 * self.settings.apify.price_per_1000_usd;
        let usd = settled
            .usage_total_usd
            .unwrap_or(0.0)
            .max(run.usage_total_usd.unwrap_or(0.0))
            .max(counted);
        let status = run.status.clone();
        if items == 0 && status != "SUCCEEDED" && !is_second(state, step) {
            state.record(Event::Failed { step, status, usd })?;
            return Err(Failure::World(format!(
                "the run {} ended as {} and left nothing; run this again to try once more, perhaps with a smaller \
                 collection.apify.conversations_per_run",
                run.id,
                run.verdict()
            ))
            .into());
        }
        self.app.info(format_args!(
            "run {}: {items} items, about ${usd:.2}",
            step + 1
        ));
        state.record(Event::Finished {
            step,
            status,
            items,
            usd,
        })
    }

    /// What `work` gives, or nothing where the user wants it to end.
    async fn unless_interrupted<T>(
        &self,
        work: impl Future<Output = anyhow::Result<T>>,
    ) -> anyhow::Result<Option<T>> {
        tokio::pin!(work);
        loop {
            if self.app.interrupted()? {
                return Ok(None);
            }
            if let Some(done) = self.for_a_moment(work.as_mut()).await {
                return done.map(Some);
            }
        }
    }

    /// What `work` gives, which costs money or undoes something: a request under way is
    /// waited for, so that its outcome is known; after an interruption none is repeated.
    async fn seen_through<T>(&self, work: impl Future<Output = T>) -> anyhow::Result<T> {
        tokio::pin!(work);
        let mut rounds = 0_u32;
        loop {
            if let Some(done) = self.for_a_moment(work.as_mut()).await {
                return Ok(done);
            }
            if self.app.interrupted()? {
                match rounds {
                    0 => self.api.give_up(),
                    // It was no wait between attempts, which would have ended.
                    1 => self
                        .app
                        .info("waiting for the answer to a request that may cost money"),
                    _ => {}
                }
                rounds += 1;
            }
        }
    }

    /// Works on for a tenth of a second, and tells what had to be tried again.
    async fn for_a_moment<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let done = tokio::time::timeout(Duration::from_millis(100), work)
            .await
            .ok();
        for retry in self.api.retries() {
            self.app.warn(retry);
        }
        done
    }
}
