'use strict';
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (tag, text = '', attributes = {}) => {
    const element = document.createElement(tag);
    element.textContent = text;
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const table = document.getElementById('results');
  const heads = all('thead th', table);
  const lines = all('tbody tr', table);
  const byRow = new Map(lines.map((line) => [line.dataset.row, line]));
  document.body.classList.add('live');

  // ---------------------------------------------------------------- the numbers of a point

  const tip = document.getElementById('tip');
  let active = null;

  function hide() {
    if (active === null) return;
    active.removeAttribute('aria-describedby');
    active = null;
    tip.hidden = true;
    for (const element of all('.active')) element.classList.remove('active');
  }

  function show(point) {
    if (active === point) return;
    hide();
    active = point;
    point.setAttribute('aria-describedby', 'tip');
    const row = point.dataset.row;
    for (const element of all(`[data-row="${row}"]`)) element.classList.add('active');
    const list = make('dl');
    [...byRow.get(row).cells].forEach((cell, index) => {
      if (cell.dataset.value === '' || heads[index].dataset.name === '') return;
      const text = cell.cloneNode(true);
      for (const unseen of all('.unseen, svg', text)) unseen.remove();
      list.append(make('dt', heads[index].dataset.name), make('dd', text.textContent));
    });
    tip.replaceChildren(make('b', byRow.get(row).dataset.name), list);
    tip.hidden = false;
    place();
  }

  /** Beside the point where there is room, else above or below it. */
  function place() {
    const mark = active.querySelector('.marker').getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = tip;
    const clamp = (value, room) => Math.max(12, Math.min(value, room - 12));
    let left = mark.right + 14;
    let top = clamp(mark.top - height / 3, innerHeight - height);
    if (left + width > innerWidth - 12) left = mark.left - 14 - width;
    if (left < 12) {
      left = clamp(mark.left - width / 2, innerWidth - width);
      top = mark.bottom + 14 + height < innerHeight ? mark.bottom + 14 : Math.max(12, mark.top - 14 - height);
    }
    tip.style.left = `${left}px`;
    tip.style.top = `${top}px`;
  }

  function nearest(points, x, y, reach) {
    let best = null;
    for (const point of points) {
      const box = point.querySelector('.marker').getBoundingClientRect();
      const distance = Math.hypot(x - (box.left + box.right) / 2, y - (box.top + box.bottom) / 2);
      if (distance < reach) [best, reach] = [point, distance];
    }
    return best;
  }

  for (const chart of all('.chart')) {
    const points = all('.point', chart);
    const follow = (event) => {
      const point = nearest(points, event.clientX, event.clientY, 36);
      if (point) show(point);
      else hide();
    };
    chart.addEventListener('pointermove', follow);
    chart.addEventListener('pointerdown', follow);
    chart.addEventListener('pointerleave', (event) => {
      if (event.pointerType === 'mouse') hide();
    });
    chart.addEventListener('focusin', (event) => show(event.target.closest('.point')));
    chart.addEventListener('focusout', hide);
    chart.addEventListener('keydown', (event) => {
      const index = points.indexOf(document.activeElement);
      const goal = {
        ArrowRight: index + 1,
        ArrowDown: index + 1,
        ArrowLeft: index - 1,
        ArrowUp: index - 1,
        Home: 0,
        End: points.length - 1,
      }[event.key];
      if (event.key === 'Escape') hide();
      if (index < 0 || goal === undefined || !points[goal]) return;
      event.preventDefault();
      points[index].setAttribute('tabindex', '-1');
      points[goal].setAttribute('tabindex', '0');
      points[goal].focus();
    });
  }
  addEventListener('scroll', () => active && (active === document.activeElement ? place() : hide()), { passive: true });

  // ---------------------------------------------------------------- the table

  heads.forEach((head, index) => {
    const button = make('button', '', { type: 'button' });
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener('click', () => {
      const down = head.getAttribute('aria-sort') === 'ascending';
      for (const other of heads) other.removeAttribute('aria-sort');
      head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
      const value = (line) => line.cells[index].dataset.value;
      const isText = !head.classList.contains('number');
      const compare = (a, b) => (isText ? a.localeCompare(b) : a - b) * (down ? -1 : 1);
      const known = lines.filter((line) => value(line) !== '').sort((a, b) => compare(value(a), value(b)));
      const missing = lines.filter((line) => value(line) === '');
      table.tBodies[0].append(...known, ...missing);
    });
  });

  const csv = document.getElementById('csv');
  const copy = document.getElementById('copy');
  copy.addEventListener('click', async () => {
    try {
      await navigator.clipboard.writeText(csv.value);
      copy.textContent = 'Copied';
      setTimeout(() => (copy.textContent = 'Copy as CSV'), 1500);
    } catch {
      csv.hidden = false; // where a page may not write to the clipboard, the text is there to be copied by hand
      csv.select();
    }
  });

  // ---------------------------------------------------------------- pictures

  const pictures = all('.samples figure');
  if (!pictures.length) return;
  const dialog = make('dialog', '', { 'aria-label': 'Samples, enlarged' });
  const frame = make('div');
  const large = make('img');
  const bar = make('p');
  const caption = make('output');
  let current = 0;

  function turn(index) {
    current = (index + pictures.length) % pictures.length;
    const image = pictures[current].querySelector('img');
    large.src = image.src;
    large.alt = image.alt;
    caption.value = image.alt.replace(/^Samples at /, '');
    // Whole multiples of small pictures, so that all pixels are of one size.
    const [width, height] = ['width', 'height'].map((name) => Number(image.getAttribute(name)));
    const factor = Math.min(frame.clientWidth / width, frame.clientHeight / height);
    large.width = width * (factor > 1 ? Math.floor(factor) : factor);
    large.classList.toggle('shrunk', factor < 1);
  }

  const step = (label, text, by) => {
    const button = make('button', text, { type: 'button', 'aria-label': label });
    button.addEventListener('click', () => turn(current + by));
    return button;
  };
  const close = make('button', 'Close', { type: 'button' });
  close.addEventListener('click', () => dialog.close());
  frame.append(large);
  bar.append(step('Previous', '←', -1), caption, step('Next', '→', 1), close);
  dialog.append(frame, bar);
  dialog.addEventListener('keydown', (event) => {
    if (event.key === 'ArrowRight') turn(current + 1);
    if (event.key === 'ArrowLeft') turn(current - 1);
  });
  large.addEventListener('click', () => dialog.close());
  document.body.append(dialog);

  pictures.forEach((picture, index) => {
    const image = picture.querySelector('img');
    const button = make('button', '', { type: 'button', 'aria-label': `Enlarge: ${image.alt}` });
    image.replaceWith(button);
    button.append(image);
    button.addEventListener('click', () => {
      dialog.showModal();
      turn(index);
    });
  });
})();
