//! Converts the rows of a text to times, devices and columns of numbers.

use std::collections::HashMap;

use csv::StringRecord;

use super::columns::{device_ids, index_of, labels, list_of};
use super::decimal::Loss;
use super::gather::{Column, Ids, Losses, permuted, sentinel};
use super::layout::{Layout, is_comment};
use super::notes::{Notes, Tally};
use super::number::{Census, Marks, Style, Value};
use super::options::{ReadOptions, name_of};
use super::readings::Channel;
use super::records::Records;
use super::text::{line_at, line_of};
use super::time::zone::{Certainty, Zone};
use super::time::{self, Moment, TimePlan, utc_us};
use super::{DeviceRows, ReadError, Recording};

/// Names of columns that may be device columns although they contain numbers.
const ID_WORDS: [&str; 14] = [
    "id", "station", "device", "sensor", "node", "mote", "site", "code", "store", "meter", "unit",
    "serial", "location", "dept",
];

/// Reads all rows of a text.
pub fn read(
    text: &str,
    encoding: Option<&str>,
    options: &ReadOptions,
) -> Result<Recording, ReadError> {
    let mut notes = Notes::default();
    if let Some(encoding) = encoding {
        notes.say(format!("not UTF-8; reading as {encoding}"));
    }
    let layout = Layout::find(text, options)?;
    report_layout(&layout, options, &mut notes);
    let plan = time::find(text, &layout, options, &mut notes)?;
    let style = style(&layout, &plan, options, &mut notes)?;
    let mut table = Table::new(text, &layout, plan, style, options)?;
    table.read()?;
    table.finish(notes)
}

fn report_layout(layout: &Layout, options: &ReadOptions, notes: &mut Notes) {
    if options.separator.is_none() && layout.separator != ',' {
        notes.guess(
            format!("separator {}", name_of(layout.separator)),
            "--separator",
        );
    }
    if options.header_line.is_none() {
        match layout.header_line {
            Some(1) => {}
            Some(line) => notes.guess(format!("header in line {line}"), "--header-line"),
            None => notes.guess(
                "no header: the first line holds readings; columns are named column_1, column_2, …"
                    .to_owned(),
                "--header-line",
            ),
        }
    }
    if layout.units.is_some() {
        notes.say("the line after the header is read as units".to_owned());
    }
}

fn style(
    layout: &Layout,
    plan: &TimePlan,
    options: &ReadOptions,
    notes: &mut Notes,
) -> Result<Style, ReadError> {
    let mut census = Census::default();
    let times = plan.columns();
    for row in &layout.sample {
        let cells = row
            .iter()
            .enumerate()
            .filter(|(column, _)| !times.contains(column));
        cells.for_each(|(_, cell)| census.add(cell));
    }
    let given = |decimal, thousands| Style { decimal, thousands };
    match (options.decimal, options.thousands) {
        (Some(decimal), thousands) if Some(decimal) == thousands => Err(ReadError::file(
            "--decimal and --thousands are the same".to_owned(),
        )),
        (Some(decimal), thousands) => Ok(given(decimal, thousands)),
        (None, Some(thousands)) => Ok(given(
            if thousands == '.' { ',' } else { '.' },
            Some(thousands),
        )),
        (None, None) => {
            let line = layout.header_line.unwrap_or(0) + 1;
            let style = census
                .style()
                .map_err(|reason| ReadError::line(line, reason))?;
            if style.decimal == ',' {
                notes.guess("decimal comma".to_owned(), "--decimal");
            }
            if let Some(thousands) = style.thousands {
                notes.guess(format!("'{thousands}' separates thousands"), "--thousands");
            }
            Ok(style)
        }
    }
}

/// The table while it is read.
struct Table<'t> {
    text: &'t str,
    layout: &'t Layout,
    options: &'t ReadOptions,
    plan: TimePlan,
    style: Style,
    marks: Marks,
    zone: Zone,
    /// Columns that may contain values, by their position in the file.
    taken: Vec<usize>,
    columns: Vec<Column>,
    ids: Vec<Ids>,
    moments: Vec<Moment>,
    at: Vec<usize>,
    /// Rows skipped for a wrong number of fields.
    widths: Tally,
    times: Tally,
    losses: Losses,
}

impl<'t> Table<'t> {
    fn new(
        text: &'t str,
        layout: &'t Layout,
        plan: TimePlan,
        style: Style,
        options: &'t ReadOptions,
    ) -> Result<Table<'t>, ReadError> {
        let zone = match &options.time_zone {
            None => Zone::utc(),
            Some(zone) => Zone::parse(zone)
                .map_err(|reason| ReadError::file(format!("--time-zone: {reason}")))?,
        };
        let times = plan.columns();
        let device = match options.device_column.as_deref() {
            None | Some("none") => None,
            Some(name) => Some(index_of(name, &layout.header, "--device-column")?),
        };
        let mut taken: Vec<usize> = match options.columns.is_empty() {
            true => (0..layout.width)
                .filter(|column| !times.contains(column))
                .collect(),
            false => options
                .columns
                .iter()
                .map(|name| index_of(name, &layout.header, "--columns"))
                .collect::<Result<_, _>>()?,
        };
        taken.retain(|column| Some(*column) != device);
        let ids = match (device, options.device_column.is_some()) {
            (Some(column), _) => vec![Ids::new(column)],
            (None, true) => Vec::new(),
            (None, false) => (0..layout.width)
                .filter(|column| !times.contains(column) && may_be_id(layout, *column, style))
                .map(Ids::new)
                .collect(),
        };
        let columns = taken.iter().map(|_| Column::new());
        Ok(Table {
            text,
            layout,
            options,
            plan,
            style,
            marks: Marks::new(&options.missing),
            zone,
            columns: columns.collect(),
            taken,
            ids,
            moments: Vec::new(),
            at: Vec::new(),
            widths: Tally::default(),
            times: Tally::default(),
            losses: Losses::default(),
        })
    }

    fn read(&mut self) -> Result<(), ReadError> {
        let mut records = Records::new(self.text, self.layout.data_at, self.layout.separator);
        let mut record = StringRecord::new();
        while let Some(at) = records.read(&mut record)? {
            self.push(&record, at);
        }
        let (rows, wrong) = (
            self.moments.len() as u64,
            self.widths.count + self.times.count,
        );
        if rows == 0 || wrong > rows {
            return Err(self.unreadable());
        }
        Ok(())
    }

    fn push(&mut self, record: &StringRecord, at: usize) {
        let is_wide = |field: Option<&str>| field.is_some_and(|field| !field.is_empty());
        let has_more = (self.layout.width..record.len()).any(|field| is_wide(record.get(field)));
        if record.len() < self.layout.width || has_more {
            if !is_comment(line_at(self.text, at)) {
                self.widths.add(at, &format!("{} fields", record.len()));
            }
            return;
        }
        let Some(moment) = self.plan.moment(record) else {
            let cell = record.get(self.plan.column()).unwrap_or_default();
            self.times.add(at, cell);
            return;
        };
        self.moments.push(moment);
        self.at.push(at);
        self.ids.retain_mut(|ids| {
            let is_given = self.options.device_column.is_some();
            ids.push(record.get(ids.column).unwrap_or_default(), is_given)
        });
        for (column, &place) in self.columns.iter_mut().zip(&self.taken) {
            let cell = record.get(place).unwrap_or_default();
            match self.style.read(cell, &self.marks) {
                Value::Number(number) => {
                    let loss = number.loss(cell);
                    self.losses.add(loss, at, cell);
                    let is_lost = loss == Some(Loss::TooLarge);
                    column.number(number.nearest());
                    column.builder.push((!is_lost).then_some(number));
                }
                Value::Missing => {
                    column.missing();
                }
                Value::Text => {
                    column.texts.add(at, cell);
                    column.builder.push(None);
                }
            }
        }
    }

    /// Returns an error that explains why most rows cannot be read.
    fn unreadable(&self) -> ReadError {
        let line = |tally: &Tally| tally.line(self.text);
        if self.widths.count >= self.times.count && self.widths.count > 0 {
            let (count, width) = (&self.widths.example, self.layout.width);
            let separator = name_of(self.layout.separator);
            return ReadError::line(
                line(&self.widths),
                format!(
                    "{count}, but most rows have {width}; is {separator} the wrong separator? try --separator"
                ),
            );
        }
        let title = self.layout.title(self.plan.column());
        let cell = &self.times.example;
        let cause = match cell.parse::<f64>() {
            Ok(_) => "epoch seconds? try --time-format epoch-s or epoch-ms",
            Err(_) => "try --time-column and --time-format",
        };
        ReadError::line(
            line(&self.times),
            format!("{cell:?} in {title} is not in the same time format as the others; {cause}"),
        )
    }

    fn finish(mut self, mut notes: Notes) -> Result<Recording, ReadError> {
        self.report_rows(&mut notes);
        let device = self.device_column(&mut notes);
        let (ids, names) = match device {
            None => (vec![0; self.moments.len()], vec![String::new()]),
            Some(ids) => (ids.rows, device_ids(&ids.names)),
        };
        let times_us = self.utc(&ids, &mut notes)?;
        self.leave_out(&mut notes)?;
        self.clear_sentinels(&mut notes);
        let labels = labels(self.layout, &self.taken, &mut notes);
        let order = self.order(&ids, &times_us, device_is_in(&names), &mut notes);
        let mut channels = Vec::new();
        let mut columns = Vec::new();
        for (column, (name, unit)) in self.columns.into_iter().zip(labels) {
            let (kind, exp10, values, nulls) = column.builder.finish();
            channels.push(Channel {
                name,
                unit,
                kind,
                exp10,
            });
            columns.push(permuted(&values, &nulls, &order));
        }
        let mut devices: Vec<DeviceRows> = Vec::new();
        for (row, &place) in order.iter().enumerate() {
            let id = &names[ids[place] as usize];
            match devices.last_mut() {
                Some(device) if device.id == *id => device.rows.end = row + 1,
                _ => devices.push(DeviceRows {
                    id: id.clone(),
                    rows: row..row + 1,
                }),
            }
        }
        Ok(Recording {
            bytes: 0,
            sha256: String::new(),
            channels,
            devices,
            notes: notes.into_lines(),
            times_us: order.iter().map(|place| times_us[*place]).collect(),
            columns,
        })
    }

    fn report_rows(&self, notes: &mut Notes) {
        let text = self.text;
        let width = self.layout.width;
        notes.tally(
            text,
            "row",
            &format!("skipped: not {width} fields"),
            &self.widths,
        );
        let title = self.layout.title(self.plan.column());
        notes.tally(
            text,
            "row",
            &format!("skipped: no time in {title}"),
            &self.times,
        );
        let losses = &self.losses;
        notes.tally(text, "value", "of -0 stored as 0", &losses.minus_zero);
        notes.tally(
            text,
            "whole number",
            "beyond 2^53 rounded to the nearest double",
            &losses.rounded,
        );
        notes.tally(
            text,
            "number",
            "too large for a double, stored as NULL",
            &losses.too_large,
        );
        notes.tally(
            text,
            "number",
            "too small for a double, stored as 0",
            &losses.too_small,
        );
    }

    /// Returns the device column: the given one, or a guessed one without which many times would
    /// repeat.
    fn device_column(&mut self, notes: &mut Notes) -> Option<Ids> {
        let rows = self.moments.len();
        if self.options.device_column.is_some() {
            return self.ids.pop();
        }
        let none = vec![0; rows];
        let repeats = self.repeats(&none);
        if 10 * repeats < rows {
            return None;
        }
        let candidates = std::mem::take(&mut self.ids).into_iter();
        let unique = candidates.filter(|ids| 100 * self.repeats(&ids.rows) <= rows);
        let found = unique.min_by_key(|ids| ids.names.len());
        match &found {
            Some(ids) => {
                let title = self.layout.title(ids.column);
                let what = format!(
                    "using {title} as the device column ({} devices), because {repeats} rows repeat an \
                     earlier time",
                    ids.names.len()
                );
                notes.guess(what, "--device-column");
                let at = self.taken.iter().position(|column| *column == ids.column);
                if let Some(at) = at {
                    self.taken.remove(at);
                    self.columns.remove(at);
                }
            }
            None => notes.say(format!(
                "{repeats} of {rows} rows repeat an earlier time; if the file has an id column, use --device-column"
            )),
        }
        found
    }

    /// Returns the number of rows with the same time and device as an earlier one.
    fn repeats(&self, ids: &[u32]) -> usize {
        let keys = self
            .moments
            .iter()
            .zip(ids)
            .map(|(moment, id)| (*id, utc_us(*moment)));
        let mut keys: Vec<(u32, Option<i64>)> = keys.collect();
        keys.sort_unstable();
        keys.windows(2).filter(|pair| pair[0] == pair[1]).count()
    }

    fn utc(&self, ids: &[u32], notes: &mut Notes) -> Result<Vec<i64>, ReadError> {
        let is_backwards = match (self.moments.first(), self.moments.last()) {
            (Some(first), Some(last)) => utc_us(*first) > utc_us(*last),
            _ => false,
        };
        let mut before: HashMap<u32, i64> = HashMap::new();
        let (mut twice, mut never, mut locals) = (Tally::default(), Tally::default(), 0);
        let mut times_us = Vec::with_capacity(self.moments.len());
        for (row, moment) in self.moments.iter().enumerate() {
            let us = match *moment {
                Moment::Utc(us) => us,
                Moment::Local(local) => {
                    locals += 1;
                    let resolved =
                        self.zone
                            .resolve(local, before.get(&ids[row]).copied(), is_backwards);
                    let (us, certainty) = resolved.ok_or_else(|| {
                        ReadError::line(
                            line_of(self.text, self.at[row]),
                            format!("{local} is out of range"),
                        )
                    })?;
                    match certainty {
                        Certainty::Unique => {}
                        Certainty::Twice => twice.add(self.at[row], ""),
                        Certainty::Never => never.add(self.at[row], ""),
                    }
                    us
                }
            };
            before.insert(ids[row], us);
            times_us.push(us);
        }
        if locals > 0 && self.options.time_zone.is_none() {
            notes.guess("times without an offset are UTC".to_owned(), "--time-zone");
        }
        let text = self.text;
        notes.tally(
            text,
            "time",
            "in the repeated hour: the first pass is summer time",
            &twice,
        );
        notes.tally(
            text,
            "time",
            "in the skipped hour: read with the earlier offset",
            &never,
        );
        Ok(times_us)
    }

    /// Removes columns of text, columns without values, and row numbers.
    fn leave_out(&mut self, notes: &mut Notes) -> Result<(), ReadError> {
        let (mut texts, mut empty, mut counts) = (Vec::new(), Vec::new(), Vec::new());
        let mut kept = Vec::new();
        for (column, place) in std::mem::take(&mut self.columns)
            .into_iter()
            .zip(std::mem::take(&mut self.taken))
        {
            let title = self.layout.title(place);
            let is_asked_for = !self.options.columns.is_empty();
            match () {
                () if column.texts.count > column.numbers && is_asked_for => {
                    let (line, cell) = (column.texts.line(self.text), &column.texts.example);
                    return Err(ReadError::line(
                        line,
                        format!("{title} is not numeric: {cell:?}"),
                    ));
                }
                () if column.texts.count > column.numbers => texts.push(title),
                () if column.numbers == 0 => empty.push(title),
                () if column.is_row_number(&self.layout.header[place]) && !is_asked_for => {
                    counts.push(title)
                }
                () => {
                    let what = format!("of {title} stored as NULL: not a number");
                    notes.tally(self.text, "cell", &what, &column.texts);
                    kept.push((column, place));
                }
            }
        }
        let mut say = |what: &str, titles: Vec<String>| {
            if !titles.is_empty() {
                notes.say(format!("skipped {what}: {}", list_of(&titles)));
            }
        };
        say("columns of text", texts);
        say("columns without values", empty);
        say("row numbers", counts);
        if kept.is_empty() {
            let line = line_of(self.text, self.layout.data_at);
            let reason = "no numeric column in addition to the time; is the decimal separator wrong? \
                 try --decimal and --separator";
            return Err(ReadError::line(line, reason.to_owned()));
        }
        (self.columns, self.taken) = kept.into_iter().unzip();
        Ok(())
    }

    /// Replaces numbers that stand for missing values: those far below all others in their column.
    fn clear_sentinels(&mut self, notes: &mut Notes) {
        if !self.marks.guess() {
            return;
        }
        let mut found: HashMap<u64, (f64, u64, u32)> = HashMap::new();
        for column in &mut self.columns {
            while let Some(mark) = sentinel(&column.builder) {
                let cleared = column.builder.clear(mark);
                let entry = found.entry(mark.to_bits()).or_insert((mark, 0, 0));
                (entry.1, entry.2) = (entry.1 + cleared, entry.2 + 1);
            }
        }
        let mut found: Vec<(f64, u64, u32)> = found.into_values().collect();
        found.sort_by(|a, b| a.0.total_cmp(&b.0));
        for (mark, cells, columns) in found {
            let plural = if columns == 1 { "" } else { "s" };
            notes.guess(
                format!(
                    "treating {mark} as a missing value ({cells} cells in {columns} column{plural})"
                ),
                "--missing",
            );
        }
    }

    /// Returns the rows sorted by device, then in runs of increasing times.
    fn order(
        &self,
        ids: &[u32],
        times_us: &[i64],
        has_devices: bool,
        notes: &mut Notes,
    ) -> Vec<usize> {
        let (mut late, mut repeated) = (Tally::default(), Tally::default());
        let mut newest: HashMap<u32, i64> = HashMap::new();
        for (row, &time_us) in times_us.iter().enumerate() {
            let newest = newest.entry(ids[row]).or_insert(time_us);
            if time_us < *newest {
                late.add(self.at[row], "");
            }
            *newest = time_us.max(*newest);
        }
        let mut order: Vec<usize> = (0..times_us.len()).collect();
        order.sort_by_key(|&row| (ids[row], times_us[row]));
        let mut occurrence = vec![0_u32; times_us.len()];
        let mut repeats = Vec::new();
        for pair in order.windows(2) {
            let (before, row) = (pair[0], pair[1]);
            if (ids[before], times_us[before]) == (ids[row], times_us[row]) {
                occurrence[row] = occurrence[before] + 1;
                repeats.push(row);
            }
        }
        repeats.sort_unstable();
        repeats
            .iter()
            .for_each(|row| repeated.add(self.at[*row], ""));
        order.sort_by_key(|&row| (ids[row], occurrence[row], times_us[row]));
        let of = if has_devices { " of the device" } else { "" };
        if late.count as usize + 1 == times_us.len() {
            notes.say("time goes backwards between rows; sorting them".to_owned());
        } else {
            notes.tally(
                self.text,
                "row",
                &format!("out of time order{of}, sorted"),
                &late,
            );
        }
        notes.tally(
            self.text,
            "row",
            &format!("with a repeated time{of}, kept"),
            &repeated,
        );
        order
    }
}

fn device_is_in(names: &[String]) -> bool {
    names.iter().any(|name| !name.is_empty())
}

/// Returns whether a column may be the device column: it has text, or numbers and a name from
/// [`ID_WORDS`].
fn may_be_id(layout: &Layout, column: usize, style: Style) -> bool {
    let marks = Marks::default();
    let cells = layout.sample.iter().filter_map(|row| row.get(column));
    let numbers = cells
        .filter(|cell| matches!(style.read(cell, &marks), Value::Number(_)))
        .count();
    let name = layout.header[column].to_lowercase();
    let mut words = name.split(|char: char| !char.is_alphanumeric());
    2 * numbers < layout.sample.len() || words.any(|word| ID_WORDS.contains(&word))
}
