#!/usr/bin/env python3
"""Makes of what was measured one table, and results.txt, results.md, results.json and proxy.svg beside it.

    tests/bench/report.py ROWS.tsv PROXY.json FOLDER ABOUT

ROWS: what the C programs print, NAME TAB MEASURED TAB GOAL TAB ok|over|-. PROXY: what proxy.py writes; may be missing.
"""
import html
import json
import os
import sys

ME = "chaos-proxy"
PEERS = (ME, "nginx", "HAProxy", "http-proxy")
HEAD = ("figure", *PEERS, "ratio (lowest..highest)", "goal", "")


# ---- text ------------------------------------------------------------------------------------------------------------

def number(value, unit):
    if value is None:
        return "-"
    if unit == "%":
        return "%+.1f" % value
    if unit in ("/s", "MB/s"):
        return "{:,.0f}".format(value)
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 or not unit else 3
    return "{:,.{}f}".format(value, digits)


def sign(f):
    return "<" if f["unit"] == "ms" and not f["ratio"] else "<=" if f["better"] == "less" else ">="


def beside(f):
    """The ratio, or what is told instead of one."""
    r = f["ratio"]
    if r and r["median"] is not None:
        return "%.2f (%.2f..%.2f)" % (r["median"], r["low"], r["high"])
    if f["unit"] == "%":
        v = f["values"][ME]
        return "%+.1f..%+.1f, %s" % (v["low"], v["high"], f["note"])
    return f.get("note", "")


def goal(f):
    return "" if f["goal"] is None else "%s %g%s" % (sign(f), f["goal"], "" if f["ratio"] else " " + f["unit"])


def lines(rows, proxy):
    """(group,) or the cells of one line."""
    yield ("in the process",)
    for name, measured, target, verdict in rows:
        yield (name, measured, "", "", "", "", "" if target == "-" else target, {"-": "", "over": "missed"}.get(verdict, verdict))
    group = None
    for f in proxy["figures"]:
        if f["group"] != group:
            group = f["group"]
            yield (group,)
        title = f["title"] + (", " + f["unit"] if f["unit"] not in ("", "/s", "MB/s") else "")
        values = [number(f["values"][p]["median"], f["unit"]) if p in f["values"] else "" for p in PEERS]
        yield (title, *values, beside(f), goal(f), {True: "ok", False: "missed", None: ""}[f["met"]])


def notes(proxy):
    told = [] if not proxy["figures"] else [
        "Rounds: %d, %g s a turn, the peers taking turns; medians. wrk, proxy and upstream share %d cores; chaos is off, replies have 100 bytes."
        % (proxy["rounds"], proxy["seconds"], proxy["cores"]),
        "Other processes took %.2f cores meanwhile, and %.2f were stolen from this machine: believe the figures when both are near 0."
        % (proxy["others"]["cores"], proxy["others"]["stolen"]),
        "A ratio is chaos-proxy's to the better of nginx and HAProxy in the same round (to HAProxy's: CPU per request, new connections).",
        "nginx has %d workers, HAProxy %d threads, http-proxy one process. Versions: " % (proxy["cores"], proxy["cores"])
        + ", ".join("%s %s" % (k, v) for k, v in proxy["versions"].items() if v) + "."]
    return told + ["SKIPPED " + s for s in proxy["skipped"]] + ["BROKEN " + s for s in proxy["broken"]]


def as_text(table, about, told):
    rows = [HEAD] + [cells for cells in table if len(cells) > 1]
    width = [max(len(r[i]) for r in rows) for i in range(len(HEAD))]
    out = about + [""]
    for cells in [HEAD, *table]:
        if len(cells) == 1:
            out += ["", cells[0].upper()]
            continue
        left = cells[1] if cells[2:5] == ("", "", "") and cells is not HEAD else None  # nothing beside it: may run on
        middle = left.ljust(sum(width[1:5]) + 6) if left else "  ".join(c.rjust(w) for c, w in zip(cells[1:5], width[1:5]))
        out.append(("%s  %s  %s  %s  %s" % (cells[0].ljust(width[0]), middle, cells[5].ljust(width[5]), cells[6].ljust(width[6]), cells[7])).rstrip())
    return "\n".join(out + [""] + told) + "\n"


def as_markdown(table, about, told):
    out = [*about, "", "| " + " | ".join(HEAD) + " |", "|---" + "|---:" * 4 + "|---" * 3 + "|"]
    for cells in table:
        cells = ("**%s**" % cells[0],) + ("",) * 7 if len(cells) == 1 else cells
        out.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n".join(out + [""] + ["- " + t for t in told]) + "\n"


# ---- plot ------------------------------------------------------------------------------------------------------------

COLOUR = {ME: "#d9480f", "nginx": "#4d6478", "HAProxy": "#8299ab", "http-proxy": "#bccad4"}
INK, SOFT, FAINT, GOOD, BAD = "#1d2733", "#66727e", "#e6eaee", "#2b8a3e", "#c92a2a"
WIDTH, MARGIN, GAP, COLUMNS = 1160, 32, 22, 4
CELL = (WIDTH - 2 * MARGIN - (COLUMNS - 1) * GAP) / COLUMNS
NAME, VALUE, STEP, BAR = 86, 54, 21, 13  # widths of the two texts of a bar, distance and height of bars


class Plot:
    def __init__(self):
        self.parts = []

    def text(self, x, y, words, size=12, fill=INK, anchor="start", weight="normal"):
        self.parts.append('<text x="%.1f" y="%.1f" font-size="%g" fill="%s" text-anchor="%s" font-weight="%s">%s</text>'
                          % (x, y, size, fill, anchor, weight, html.escape(words)))

    def box(self, x, y, w, h, fill, round_by=2.0):
        self.parts.append('<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" rx="%g" fill="%s"/>' % (x, y, max(w, 0.5), h, round_by, fill))

    def line(self, x1, y1, x2, y2, stroke, width=1.0, dash=""):
        self.parts.append('<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" stroke-width="%g"%s/>'
                          % (x1, y1, x2, y2, stroke, width, ' stroke-dasharray="%s"' % dash if dash else ""))

    def done(self, height):
        return ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" '
                'font-family="system-ui, \'Segoe UI\', Helvetica, \'DejaVu Sans\', Arial, sans-serif">\n<rect width="100%%" height="100%%" fill="#ffffff"/>\n%s\n</svg>\n'
                % (WIDTH, height, WIDTH, height, "\n".join(self.parts)))


def verdict(plot, x, y, f):
    """What was asked of it and what came, below a panel."""
    r = f["ratio"]
    if not r or r["median"] is None:
        return
    if f["goal"] is None:
        plot.text(x, y, "ratio %.2f" % r["median"], 11, SOFT)
        return
    plot.box(x, y - 8, 8, 8, GOOD if f["met"] else BAD, 4)
    plot.text(x + 14, y, "ratio %.2f, goal %s %g" % (r["median"], {"<=": "\u2264", ">=": "\u2265"}[sign(f)], f["goal"]), 11, GOOD if f["met"] else BAD)


def bars(plot, x, y, f):
    """One panel: a bar for each peer, its range over the rounds as a thin line. A bar twice as long as all others is cut."""
    shown = [p for p in PEERS if p in f["values"] and f["values"][p]["median"] is not None]
    tops = sorted(f["values"][p]["high"] for p in shown)
    top = tops[-1] if len(tops) < 2 else min(tops[-1], 1.6 * tops[-2])
    room = CELL - NAME - VALUE
    for p in shown:
        v = f["values"][p]
        middle, cut = y + BAR / 2, v["median"] > top
        end, low, high = (room * min(v[k], top) / (top or 1) for k in ("median", "low", "high"))
        plot.text(x + NAME - 8, middle + 4, p, 11, INK if p == ME else SOFT, "end", "bold" if p == ME else "normal")
        plot.box(x + NAME, y, end, BAR, COLOUR[p])
        if cut:
            for k in (0, 5):
                plot.line(x + NAME + end - 16 + k, y + BAR + 2, x + NAME + end - 10 + k, y - 2, "#ffffff", 2)
        elif len(v["rounds"]) > 1:
            plot.line(x + NAME + low, middle, x + NAME + high, middle, INK, 1.2)
        plot.text(x + NAME + max(end, 0 if cut else high) + 6, middle + 4, number(v["median"], f["unit"]), 11, INK, weight="bold" if p == ME else "normal")
        y += STEP
    verdict(plot, x + NAME, y + 9, f)


def row(plot, y, title, better, panels):
    """A heading over four panels: (title of the panel, figure)."""
    plot.line(MARGIN, y, WIDTH - MARGIN, y, FAINT)
    plot.text(MARGIN, y + 22, title, 14, INK, weight="bold")
    if better:
        plot.text(WIDTH - MARGIN, y + 22, better + " is better", 11, SOFT, "end")
    for i, (name, f) in enumerate(panels):
        x = MARGIN + i * (CELL + GAP)
        plot.text(x + NAME, y + 46, name, 12, SOFT)
        if f:
            bars(plot, x, y + 56, f)
        else:
            plot.text(x + NAME, y + 68, "not measured", 11, SOFT)
    return y + 56 + len(PEERS) * STEP + 32


def scale_row(plot, y, x, width, name, low, median, high, scale, target, met, words):
    """One horizontal line of a wide panel: median as a bar from 0, the range as a thin line, the goal as a tick."""
    left, zero = x + 160, x + 160 + (width - 260) * (scale["from"] / scale["all"])

    def at(v):
        return max(left, min(left + width - 260, zero + (width - 260) * v / scale["all"]))
    middle = y + BAR / 2
    plot.text(left - 10, middle + 4, name, 11, INK, "end")
    plot.box(min(zero, at(median)), y, abs(at(median) - zero), BAR, COLOUR[ME] if target is not None else COLOUR["HAProxy"])
    plot.line(at(low), middle, at(high), middle, INK, 1.2)
    if scale["from"]:
        plot.line(zero, y - 3, zero, y + BAR + 3, SOFT)
    if target is not None:
        plot.line(at(target), y - 4, at(target), y + BAR + 4, GOOD if met else BAD, 2)
    plot.text(left + width - 254, middle + 4, words, 11, INK if target is None else GOOD if met else BAD)


def late_panel(plot, x, y, width, figures):
    """Each line has a scale of its own: its goal stands at the same place."""
    plot.text(x, y + 22, "End of an injected delay of 200 ms: late by", 14, INK, weight="bold")
    plot.text(x, y + 40, "median (bar) and p99 (line), in ms; the tick is the goal for the median", 11, SOFT)
    for i, f in enumerate(figures):
        v = f["values"][ME]
        scale = {"from": 0, "all": 4 * f["goal"]}
        name = f["title"].split(":")[0]
        scale_row(plot, y + 56 + i * 26, x, width, name, v["median"], v["median"], v["high"], scale, f["goal"], f["met"],
                  "%s, p99 %s" % (number(v["median"], "ms"), number(v["high"], "ms")))


def cost_panel(plot, x, y, width, figures):
    plot.text(x, y + 22, "Chaos on but hitting nothing: requests/s lost", 14, INK, weight="bold")
    plot.text(x, y + 40, "against off, in %, median (bar) and range of the rounds (line); the tick is the goal", 11, SOFT)
    reach = max([4.0] + [abs(f["values"][ME][k]) for f in figures for k in ("median", "low", "high")])
    for i, f in enumerate(figures):
        v = f["values"][ME]
        name = f["title"].split(":")[0].split(" (")[0]
        scale_row(plot, y + 56 + i * 26, x, width, name, v["low"], v["median"], v["high"], {"from": reach, "all": 2 * reach}, f["goal"], f["met"],
                  number(v["median"], "%") + " %")


def as_plot(proxy, about):
    by = {f["key"]: f for f in proxy["figures"]}
    plot = Plot()
    loads = (("1", "1 connection"), ("64", "64 connections"), ("1000", "1,000 connections"), ("new", "a new connection each"))
    plot.text(MARGIN, 44, "chaos-proxy, chaos off, beside the proxies people know", 21, INK, weight="bold")
    plot.text(MARGIN, 66, "100-byte replies. wrk, proxy and upstream share %d cores. Rounds: %d, %g s a turn. Bars are medians, thin lines go from the lowest to the highest round."
              % (proxy["cores"], proxy["rounds"], proxy["seconds"]), 12, SOFT)
    plot.text(MARGIN, 83, about, 12, SOFT)
    y = 104
    for key, title, better in (("rate", "Requests per second", "more"), ("p99", "Latency, p99, ms", "less"), ("cpu", "CPU per request, \u00b5s", "less")):
        y = row(plot, y, title, better, [(name, by.get(load + "." + key)) for load, name in loads])
    y = row(plot, y, "Memory at 1,000 connections (PSS and kernel stacks), and a download of 100 MB", "", [
        ("MB under load, less is better", by.get("memory.load")), ("MB idle, less is better", by.get("memory.idle")),
        ("MB/s, more is better", by.get("download.rate")), ("CPU s per GB, less is better", by.get("download.cpu"))])
    plot.line(MARGIN, y, WIDTH - MARGIN, y, FAINT)
    half = (WIDTH - 2 * MARGIN - GAP) / 2
    late_panel(plot, MARGIN, y, half, [by[k] for k in ("late.1.wake", "late.50.wake", "late.1000.wake") if k in by])
    cost_panel(plot, MARGIN + half + GAP, y, half, [by[k] for k in ("cost.again", "cost.on", "cost.rule") if k in by])
    return plot.done(int(y + 150))


# ---- all of it -------------------------------------------------------------------------------------------------------

def main():
    rows_path, proxy_path, folder, about = sys.argv[1:5]
    with open(rows_path) as f:
        rows = [line.rstrip("\n").split("\t") for line in f]
    proxy = {"figures": [], "skipped": ["the proxies were not measured"], "broken": []}
    if os.path.exists(proxy_path):
        with open(proxy_path) as f:
            proxy = json.load(f)
    table, about, told = list(lines(rows, proxy)), about.splitlines(), notes(proxy)
    text = as_text(table, about, told)
    keys = ("name", "measured", "goal", "met")
    whole = {"about": about, "process": [dict(zip(keys, r)) for r in rows], **proxy}
    files = {"results.txt": text, "results.md": as_markdown(table, about, told), "results.json": json.dumps(whole, indent=1) + "\n"}
    if proxy["figures"]:
        files["proxy.svg"] = as_plot(proxy, about[0])
    for name, content in files.items():
        with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
            f.write(content)
    print("\n" + text)


if __name__ == "__main__":
    main()
