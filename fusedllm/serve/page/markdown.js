// A small safe subset of markdown, made of DOM nodes and text only: whatever a model writes, it stays text.
// Paragraphs, headings, lists, code blocks; inline code, bold, italics. Everything else shows as it was written.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const ITEM = /^( *)([-*+•]|\d{1,9}[.)])(?: +(.*)|)$/;
// Lists in lists deeper than this stay text: nobody reads them, and no text can exhaust the stack.
const MAX_DEPTH = 6;

function element(tag, className, ...children) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  node.append(...children);
  return node;
}

const indentOf = (line) => line.length - line.trimStart().length;

/** The blocks of a text: `{type, raw, ...}`, where `raw` alone decides how the block looks. */
export function blocks(text, depth = 0) {
  const lines = text.replaceAll("\t", "    ").split(/\r?\n/);
  const found = [];
  let at = 0;
  while (at < lines.length) {
    const start = at;
    const line = lines[at];
    const fence = FENCE.exec(line);
    const heading = HEADING.exec(line);
    let block;
    if (!line.trim()) {
      at += 1;
      continue;
    } else if (fence) {
      const code = [];
      for (at += 1; at < lines.length && !closes(lines[at], fence[1]); at += 1) code.push(lines[at]);
      at += 1;
      block = { type: "code", language: fence[2], code: code.join("\n") };
    } else if (heading) {
      at += 1;
      block = { type: "heading", level: heading[1].length, text: heading[2] };
    } else if (depth < MAX_DEPTH && ITEM.test(line)) {
      [block, at] = list(lines, at);
    } else {
      for (at += 1; at < lines.length && continues(lines[at]); at += 1);
      block = { type: "paragraph", text: lines.slice(start, at).join("\n").trim() };
    }
    block.raw = lines.slice(start, at).join("\n");
    found.push(block);
  }
  return found;
}

function closes(line, fence) {
  const text = line.trim();
  return text.length >= fence.length && text === fence[0].repeat(text.length);
}

/** Whether a line goes on with the paragraph before it. As in CommonMark, a number but 1 starts no list there. */
function continues(line) {
  const item = ITEM.exec(line);
  return line.trim() !== "" && !FENCE.test(line) && !HEADING.test(line) && !(item?.[3] && !/^(?!1[.)])\d/.test(item[2]));
}

function list(lines, at) {
  const [, { length: margin }, mark] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(mark);
  const items = [];
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (!item || item[1].length > margin + 1 || /\d/.test(item[2]) !== ordered) break;
    const inside = [item[3] ?? ""];
    const indent = item[1].length + item[2].length + 1;
    for (at += 1; at < lines.length; at += 1) {
      const line = lines[at];
      const deeper = indentOf(line) >= margin + 2;
      if (!line.trim()) {
        // A blank line stays inside if the item goes on after it.
        const next = lines.slice(at + 1).find((later) => later.trim());
        if (next === undefined || indentOf(next) < margin + 2) break;
        inside.push("");
      } else if (deeper) {
        inside.push(line.slice(Math.min(indentOf(line), indent)));
      } else if (continues(line) && !ITEM.test(line) && lines[at - 1].trim()) {
        inside.push(line.trim());
      } else break;
    }
    items.push(inside.join("\n"));
    let next = at;
    while (next < lines.length && !lines[next].trim()) next += 1;
    if (next < lines.length && ITEM.test(lines[next])) at = next;
  }
  return [{ type: "list", ordered, first: Number.parseInt(mark, 10), items }, at];
}

/** Text with its inline code, bold and italics. A mark without its other half stays as it was written. */
function inline(text) {
  const fragment = document.createDocumentFragment();
  const marks = /`+|\*+/g;
  let shown = 0;
  for (let mark = marks.exec(text); mark; mark = marks.exec(text)) {
    const inside = mark.index + mark[0].length;
    const end = mark[0][0] === "`" ? endOfCode(text, mark[0], inside) : endOfStars(text, mark[0], mark.index);
    if (end < 0) continue;
    const content = text.slice(inside, end);
    if (mark.index > shown) fragment.append(text.slice(shown, mark.index));
    if (mark[0][0] === "`") fragment.append(element("code", "", content.trim() || content));
    else fragment.append(element(mark[0].length === 2 ? "strong" : "em", "", inline(content)));
    shown = marks.lastIndex = end + mark[0].length;
  }
  if (shown < text.length) fragment.append(text.slice(shown));
  return fragment;
}

/** Where the run of backticks of the same length begins, or -1. */
function endOfCode(text, mark, from) {
  for (const run of text.slice(from).matchAll(/`+/g)) if (run[0] === mark) return from + run.index;
  return -1;
}

/** Where the stars begin that close those at `start`, or -1: one or two, around words, outside of products (2*3*4). */
function endOfStars(text, mark, start) {
  const inside = start + mark.length;
  if (mark.length > 2 || /^(\s|$)/.test(text.slice(inside, inside + 1)) || /\w/.test(text[start - 1] ?? "")) return -1;
  for (const run of text.slice(inside).matchAll(/`+[^`]*`+|\*+/g)) {
    const at = inside + run.index;
    // Of three stars the first closes an inner italic, the last two this one.
    if (run[0] === mark && /\S/.test(text[at - 1])) return at;
    if (mark === "**" && run[0] === "***") return at + 1;
  }
  return -1;
}

function build(block, depth) {
  switch (block.type) {
    case "code":
      return codeBlock(block);
    case "heading":
      // The page has h1, a turn is an h2.
      return element(`h${Math.min(block.level + 2, 6)}`, "", inline(block.text));
    case "list": {
      const node = element(block.ordered ? "ol" : "ul", "");
      if (block.ordered && block.first !== 1) node.start = block.first;
      for (const item of block.items) {
        const inside = blocks(item, depth + 1);
        const tight = inside[0]?.type === "paragraph";
        const entry = element("li", "", ...(tight ? [inline(inside.shift().text)] : []));
        entry.append(...inside.map((child) => build(child, depth + 1)));
        node.append(entry);
      }
      return node;
    }
    default:
      return element("p", "", inline(block.text));
  }
}

function codeBlock({ language, code }) {
  const copy = element("button", "quiet small copy-code", "Copy");
  copy.type = "button";
  const pre = element("pre", "", element("code", "", code));
  // It scrolls sideways, so the keyboard must reach it.
  pre.tabIndex = 0;
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", language ? `Code, ${language}` : "Code");
  return element("div", "code", element("div", "code-bar", element("span", "", language || "text"), copy), pre);
}

/** Shows `text` in `container`; blocks that look as before keep their nodes, with selection and focus in them. */
export function render(container, text) {
  const before = container.shownBlocks ?? [];
  const now = blocks(text);
  now.forEach((block, index) => {
    const old = before[index];
    const node = container.children[index];
    if (old?.raw === block.raw) return;
    if (old?.type === "code" && block.type === "code" && old.language === block.language) {
      node.querySelector("code").textContent = block.code;
    } else if (node) node.replaceWith(build(block, 0));
    else container.append(build(block, 0));
  });
  while (container.children.length > now.length) container.lastElementChild.remove();
  container.shownBlocks = now;
}
