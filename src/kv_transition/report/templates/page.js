"use strict";
// Charts take the place of their still drawings on the screen; print and browsers without scripts keep the drawings.
(() => {
  const holder = document.getElementById("charts");
  if (!holder || !window.vegaEmbed) return;
  const specs = JSON.parse(holder.textContent);
  const options = JSON.parse(document.getElementById("embed").textContent);
  for (const place of document.querySelectorAll("[data-chart]")) {
    const spec = specs[place.dataset.chart];
    if (!spec) continue;
    place.hidden = false;
    window.vegaEmbed(place, window.fitTitle(spec, place.clientWidth), options).then(
      () => {
        place.parentElement.classList.add("drawn");
        place.querySelector("summary").setAttribute("aria-label", "Save this figure");
        // Vega-Embed makes the file when the mouse is pressed; a link that the keyboard reaches needs it, too.
        for (const link of place.querySelectorAll(".vega-actions a")) {
          link.addEventListener("focus", () => link.dispatchEvent(new MouseEvent("mousedown")));
        }
      },
      () => { place.hidden = true; },
    );
  }
})();

// A box is a stop of the keyboard only while there is something to scroll in it.
(() => {
  const sized = new ResizeObserver((changes) => {
    for (const { target } of changes) target.tabIndex = target.scrollWidth > target.clientWidth ? 0 : -1;
  });
  for (const box of document.querySelectorAll(".scroll, .drawing, pre")) sized.observe(box);
})();

// Paper shows what is folded away on the screen.
window.addEventListener("beforeprint", () => {
  for (const folded of document.querySelectorAll("details")) folded.open = true;
});

// Single answers: every example that fits the search, a page at a time.
(() => {
  const holder = document.getElementById("examples-data");
  if (!holder) return;
  const data = JSON.parse(holder.textContent);
  const root = document.getElementById("answers");
  const field = (name) => root.querySelector(`[name="${name}"]`);
  const body = root.querySelector("tbody");
  const head = root.querySelector("thead tr");
  const count = root.querySelector("[data-count]");
  const more = root.querySelector("[data-more]");
  const step = 20;
  let shown = step;

  const make = (tag, text, className) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  };
  const fill = (select, values, all) => {
    if (all) select.append(new Option(all, ""));
    for (const value of values) select.append(new Option(value, value));
    if (values.length < 2) select.parentElement.hidden = true;
  };
  fill(field("mode"), data.modes);
  fill(field("budget"), data.budgets);
  fill(field("bin"), data.bins, "all");

  const mark = (answer) => {
    const [, score, failure] = answer;
    if (failure) return ["!", `failed: ${failure}`, "failed"];
    if (score === null) return ["?", "no score", "failed"];
    if (score >= 0.9995) return ["✓", "right", "right"];
    if (score <= 0) return ["✗", "wrong", "wrong"];
    return ["≈", `partly right, score ${score}`, "partly"];
  };
  const cell = (answer) => {
    const td = make("td");
    if (!answer) { td.append("–"); return td; }
    const [sign, words, kind] = mark(answer);
    const badge = make("span", sign, `mark ${kind}`);
    badge.setAttribute("role", "img");
    badge.setAttribute("aria-label", words);
    badge.title = words;
    td.append(badge, " ", make("span", answer[0].trim() === "" ? "(empty)" : answer[0], "text"));
    const note = answer[2] || (kind === "partly" ? answer[1].toFixed(2) : "");
    if (note) td.append(make("small", note));
    return td;
  };

  const draw = () => {
    const words = field("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const [mode, budget, bin, which] = ["mode", "budget", "bin", "which"].map((name) => field(name).value);
    const own = (row) => row.answers[budget] || {};
    const score = (answer) => (answer && answer[1] !== null ? answer[1] : 0);
    const rows = data.rows.filter((row) => {
      if (row.mode !== mode || (bin && row.bin !== bin)) return false;
      const answers = Object.values(own(row));
      if (which === "lost" && !(row.full && answers.some((a) => score(a) < score(row.full)))) return false;
      if (which === "failed" && !answers.some((a) => a[2])) return false;
      if (!words.length) return true;
      const text = [row.id, row.question, row.gold, row.full ? row.full[0] : "", ...answers.map((a) => `${a[0]} ${a[2] || ""}`)]
        .join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    });
    const policies = data.policies.filter((policy) => data.rows.some((row) => own(row)[policy]));
    head.replaceChildren(...["Question", "Gold", "Tokens", "full", ...policies].map((name) => {
      const th = make("th", name);
      th.scope = "col";
      return th;
    }));
    body.replaceChildren(...rows.slice(0, shown).map((row) => {
      const tr = make("tr");
      const question = make("th", row.question || row.id);
      question.scope = "row";
      question.title = row.id;
      if (data.several_tasks) question.append(make("small", row.task));
      tr.append(question, make("td", row.gold), make("td", row.bin.replace(" tokens", "")), cell(row.full),
        ...policies.map((policy) => cell(own(row)[policy])));
      return tr;
    }));
    const visible = Math.min(shown, rows.length);
    count.textContent = rows.length ? `${visible} of ${rows.length} examples` : "No example fits; search for something else.";
    more.hidden = rows.length <= shown;
  };
  root.querySelector("form").addEventListener("input", () => { shown = step; draw(); });
  root.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => { shown += step; draw(); });
  root.querySelector("[data-live]").hidden = false;
  draw();
})();
