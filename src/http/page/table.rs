//! A table whose rows become cards on a small screen, with the title of the column before each value.

use maud::{Markup, html};

/// A column with its title.
#[derive(Clone, Copy)]
pub(super) enum Column {
    Text(&'static str),
    Number(&'static str),
}

impl Column {
    fn title(self) -> &'static str {
        match self {
            Column::Text(title) | Column::Number(title) => title,
        }
    }

    fn is_number(self) -> bool {
        matches!(self, Column::Number(_))
    }
}

/// Returns a table, which the element `labelled_by` names. The first cell names its row.
pub(super) fn table<const N: usize>(
    labelled_by: &str,
    columns: [Column; N],
    rows: impl IntoIterator<Item = [Markup; N]>,
) -> Markup {
    html! {
        table .cards aria-labelledby=(labelled_by) {
            thead { tr {
                @for column in columns { th .number[column.is_number()] scope="col" { (column.title()) } }
            } }
            tbody {
                @for row in rows {
                    tr { @for (index, (cell, column)) in row.into_iter().zip(columns).enumerate() {
                        @if index == 0 {
                            th scope="row" { (cell) }
                        } @else if cell.0.is_empty() {
                            td {}
                        } @else {
                            td .number[column.is_number()] data-label=(column.title()) { (cell) }
                        }
                    } }
                }
            }
        }
    }
}
